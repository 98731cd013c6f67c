"""Hosts unlike most: each works, or is refused by name before anything has changed."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import prune

import esper
from esper.kasmina.export.exporter import export
from esper.kasmina.export.writing import save_exported
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.slot import Phase
from esper.kasmina.slots.unfit import check_learning, find_misfit
from esper.leyline.errors import ConfigError
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World
from tests.support.dist import run_distributed
from tests.support.grown_hosts import Delta
from tests.support.odd_hosts import Bytes, Expanded, Ragged, Scaled, counting, ragged

X = torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def convolutions(activation: nn.Module | None = None) -> nn.Sequential:
    torch.manual_seed(2)
    first, second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    return nn.Sequential(first, activation or nn.ReLU(), second, nn.ReLU(), *head)


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3))


REFUSED: list[tuple[str, Callable[[], nn.Module], dict[str, str] | str, str]] = [
    ("lazy", lazy, {"r0c0": "2"}, r"^0\.weight of the model is not initialised yet .* run one forward first"),
    (
        "scripted site",
        lambda: convolutions(torch.jit.script(Scaled())),
        {"r0c0": "1"},
        r"^site '1' of slot r0c0 is a torch\.jit\.ScriptModule, which takes no hooks: choose a module around it",
    ),
    (
        "scripted by pattern",
        lambda: convolutions(torch.jit.script(Scaled())),
        r"[12]",
        r"^site '1' of sites = '\[12\]' is a torch\.jit\.ScriptModule",
    ),
    (
        "below a scripted one",
        lambda: nn.Sequential(torch.jit.script(convolutions())),
        {"r0c0": "0.1"},
        r"^site '0\.1' of slot r0c0 is a torch\.jit\.ScriptModule",
    ),
    (
        "scripted root",
        lambda: torch.jit.script(convolutions()),
        {"r0c0": "1"},
        r"^the model is a torch\.jit\.ScriptModule, which takes no hooks: attach before torch\.jit",
    ),
]


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature", "ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize(("build", "sites", "text"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_what_cannot_grow_is_refused_by_name(build, sites, text) -> None:
    model = build()
    with pytest.raises(ConfigError) as caught:
        esper.attach(model, sites, X)
    (line,) = str(caught.value).splitlines()
    assert re.search(text, line), line
    assert not hasattr(model, "esper_slots")


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_modules_grow_once_they_have_run() -> None:
    model = lazy()
    model(X)
    assert plant(esper.attach(model, {"r0c0": "2"}, X))


def plant(grown: Grown) -> bool:
    """Fills the first slot at full alpha; returns whether the seed matters for the output."""
    model = grown.model.eval()
    before = model(X).detach()
    slot, site = next(iter(grown.sites.items()))
    holder: Any = grown.slots[slot]
    torch.manual_seed(3)
    holder.plant(Delta(site.dim, site.topology.channel_axis))
    holder.phase = Phase.BLEND
    holder.set_alpha(1.0)
    return not torch.equal(model(X), before)


def test_expanded_buffers_get_memory_of_their_own_and_stay_equal() -> None:
    model = Expanded()
    before = model(X)
    grown = esper.attach(model, {"r0c0": "conv"}, X)
    assert torch.equal(model(X), before)
    assert model.mask is model.same, "one tensor under two names stays one"
    model.load_state_dict(model.state_dict())
    assert plant(grown)
    assert torch.equal(grown.export()(X), model(X))


def test_a_ragged_batch_goes_in_and_a_ragged_site_is_refused() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.rest = nn.Linear(6, 6), Ragged()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rest(self.first(x))

    x = ragged(X)
    assert set(esper.attach(Root(), {"r0c0": "rest.inner"}, x).slots) == {"r0c0"}
    with pytest.raises(ConfigError, match=r"site 'first' of slot r0c0 returns a nested tensor, need float .*: pad it"):
        esper.attach(Root(), {"r0c0": "first"}, x)


def masked(module: nn.Module) -> nn.Module:
    prune.l1_unstructured(module, "weight", 0.5)
    return module


COMPUTED = {
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "pruning mask": masked,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_a_hook_computes_is_exported(kind: str, tmp_path: Path) -> None:
    model = convolutions()
    COMPUTED[kind](model[2])
    COMPUTED[kind](model[6])
    for _ in range(2):
        model(X).sum().backward()
    grown = esper.attach(model, {"r0c0": "1"}, X)
    assert plant(grown)
    plain = grown.export()
    assert torch.equal(plain(X), model(X))
    assert not plain[2].weight.equal(torch.zeros(()))
    with torch.no_grad():  # the copy's hook computes the copy's weight
        for name, parameter in plain.named_parameters():
            parameter.mul_(2.0 if name.startswith("6.") else 1.0)
    assert not torch.equal(plain(X), model(X))
    save_exported(export(grown), tmp_path / "out")


def test_a_weight_that_a_hook_computes_is_not_folded_into() -> None:
    model = nn.Sequential(nn.Flatten(), torch.nn.utils.spectral_norm(nn.Linear(36, 4)), nn.ReLU(), nn.Linear(4, 3))
    grown = esper.attach(model, {"r0c0": "1"}, X)
    holder: Any = grown.slots["r0c0"]
    holder.plant(nn.Linear(4, 4))
    holder.phase = Phase.BLEND
    holder.set_alpha(1.0)
    model.eval()
    assert torch.equal(grown.export()(X), model(X))


def test_extra_state_of_plain_data_is_exported_and_left_out_of_the_tensors_by_name(tmp_path: Path) -> None:
    grown = esper.attach(counting(), {"r0c0": "2"}, X)
    assert plant(grown)
    save_exported(export(grown), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "topology.json").read_text())
    assert record["not_in_weights"] == ["1._extra_state"]


def test_what_a_session_or_run_cannot_save_or_judge_is_named() -> None:
    check_learning(counting())
    with pytest.raises(ConfigError, match=r"^module '0' \(Bytes\): its get_extra_state\(\) holds a bytes"):
        check_learning(nn.Sequential(Bytes(2, 2)))
    for kind in (nn.Embedding, nn.EmbeddingBag):
        with pytest.raises(ConfigError, match=rf"^module '0' \({kind.__name__}\) makes sparse gradients"):
            check_learning(nn.Sequential(kind(7, 4, sparse=True)))
    frozen = nn.Sequential(nn.Embedding(7, 4, sparse=True)).requires_grad_(False)
    check_learning(frozen)
    assert find_misfit({"a": [1, (None, "x", torch.ones(2))], 3: True}) is None
    assert find_misfit({"a": [{1, 2}]}) == "set"


def shard(rank: int) -> list[str]:
    """What attach and a session say of a host that is sharded before, or after attach."""
    world = World(WorldConfig(), ControlConfig())
    mesh, said = init_device_mesh("cpu", (world.size,)), []
    model = convolutions()
    fully_shard(model, mesh=mesh)
    for act in (lambda: esper.attach(model, {"r0c0": "1"}, X), lambda: attach_late(mesh)):
        try:
            act()
        except ConfigError as error:
            said.append(str(error))
    world.close()
    return said


def attach_late(mesh: Any) -> None:
    model = convolutions()
    grown = esper.attach(model, {"r0c0": "1"}, X)
    fully_shard(model, mesh=mesh)
    esper.Session(grown, torch.optim.SGD(model.parameters(), lr=0.1), controller="none")


def test_a_sharded_host_is_refused_by_name() -> None:
    for said in run_distributed(shard, 2):
        assert len(said) == 2
        for line in said:
            assert re.search(
                r"^\d\.weight of the model is a DTensor .*: sharded hosts cannot grow, since every rank", line
            )
