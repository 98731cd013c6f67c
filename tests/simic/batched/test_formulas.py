"""The formulas for many nets against the modules that they stand for; and what cannot be stepped together."""

from typing import Any

import pytest
import torch
from torch import nn

from esper.kasmina.births.build import build_gate, build_seed
from esper.kasmina.blueprints import registry
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology
from esper.simic.batched import maps, sequences
from tests.support.many_hosts import trials_of
from tests.support.tiny import tiny_config

FORMS: dict[Topology, tuple[Any, tuple[int, ...]]] = {
    Topology.FEATURE_MAP: (maps, (8, 5, 4)),
    Topology.SEQUENCE: (sequences, (7, 8)),
}
NAMES = [(topology, name) for topology, (form, _) in FORMS.items() for name in form.DELTAS]


def on_lanes(form: Any, formula: Any, seeds: list[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """The formula on all seeds at once, [L, B, ...]."""
    named = [dict(seed.named_parameters()) for seed in seeds]
    weights = {name: torch.stack([each[name] for each in named]) for name in named[0]}
    out: torch.Tensor = formula(x.transpose(0, 1) if form.LANES else x, weights)
    return out.transpose(0, 1) if form.LANES else out


@pytest.mark.parametrize(("topology", "name"), NAMES)
def test_each_blueprint(topology: Topology, name: str) -> None:
    form, shape = FORMS[topology]
    seeds = [build_seed(name, dim=8, topology=topology, key=key, dtype=torch.float64, device="cpu") for key in range(3)]
    x = torch.randn(3, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    mine = on_lanes(form, form.DELTAS[name], seeds, x)
    theirs = torch.stack([seed(lane) for seed, lane in zip(seeds, x, strict=True)])
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    if not theirs.requires_grad or name == "noop":
        return
    inputs = [x, *(parameter for seed in seeds for parameter in seed.parameters())]
    grads = [torch.autograd.grad(out.square().sum(), inputs) for out in (mine, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("topology", list(FORMS))
def test_gates(topology: Topology) -> None:
    form, shape = FORMS[topology]
    gates = [build_gate(dim=8, topology=topology, key=key, dtype=torch.float64, device="cpu") for key in range(3)]
    x = torch.randn(3, 2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    theirs = torch.stack([gate(lane) for gate, lane in zip(gates, x, strict=True)])
    torch.testing.assert_close(on_lanes(form, form.gate, list(gates), x), theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("topology", list(FORMS))
def test_every_shipped_blueprint_has_a_formula(topology: Topology) -> None:
    assert {info.name for info in registry.catalogue(topology, 16, 64)} == set(FORMS[topology][0].DELTAS)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"slots__incubation": "ste"}, "slots.incubation"), ({"trainer__precision": "bf16"}, "trainer.precision")],
)
def test_settings_in_the_way(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        trials_of([tiny_config("cnn", **settings)])
