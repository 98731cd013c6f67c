"""At alpha 0 a slot changes no bit: of the features it passes on, nor of the gradient that comes back through it.

Bits are compared as integers. Equality of floats would let -0.0 pass for 0.0 and could say nothing about a NaN.
"""

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.blueprints import names
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.slot import Phase, SeedSlot
from esper.leyline.topology import Topology

DTYPES = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}
EVERY = [(topology, name) for topology in Topology for name in names(topology)]
CASES = [(*pair, dtype) for pair, dtype in itertools.product(EVERY, DTYPES)]
IDS = [f"{topology.name.lower()}-{name}-{str(dtype).removeprefix('torch.')}" for topology, name, dtype in CASES]
WEIGHTS = {"at birth": None, "inf": float("inf"), "nan": float("nan")}
SHAPES = {
    Topology.FEATURE_MAP: (2, 8, 5, 5),
    Topology.SEQUENCE: (2, 5, 8),
    Topology.SIGNAL: (2, 8, 5),
    Topology.VECTOR: (10, 8),
}
C = 8


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(DTYPES[tensor.dtype])


def same_bits(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(bits(one), bits(other))


def born(topology: Topology, name: str, dtype: torch.dtype, weights: float | None = None) -> nn.Module:
    seed = build_seed(name, dim=C, topology=topology, key=birth_key(3, "r0c0", 1), dtype=dtype, device="cpu")
    if weights is not None:
        with torch.no_grad():
            for parameter in seed.parameters():
                parameter.fill_(weights)
    return seed


def awkward(topology: Topology, dtype: torch.dtype) -> Tensor:
    """Features with both zeros, infinities, the smallest number, and NaNs of two payloads and signs."""
    torch.manual_seed(0)
    features = torch.randn(SHAPES[topology], dtype=dtype)
    flat = features.view(-1)
    zero = torch.zeros((), dtype=dtype)
    special = [-zero, zero, zero + float("inf"), zero - float("inf"), torch.nextafter(zero, zero + 1)]
    flat[: len(special)] = torch.stack(special)
    quiet = bits(torch.full((1,), float("nan"), dtype=dtype))
    integers = flat.view(DTYPES[dtype])
    integers[5], integers[6] = quiet.item() + 1, quiet.item() - (1 << (torch.iinfo(DTYPES[dtype]).bits - 1)) + 5
    assert features.isnan().sum() == 2
    return features


class Between(nn.Module):
    """A layer below the site, the site itself, and a layer above: where a gradient must come through."""

    def __init__(self, topology: Topology) -> None:
        super().__init__()
        kinds: dict[Topology, Any] = {
            Topology.FEATURE_MAP: partial(nn.Conv2d, C, C, 1),
            Topology.SIGNAL: partial(nn.Conv1d, C, C, 1),
        }
        layer = kinds.get(topology, partial(nn.Linear, C, C))
        self.below, self.site, self.above = layer(), nn.Tanh(), layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.above(self.site(self.below(x)))


def between(topology: Topology, dtype: torch.dtype) -> tuple[Grown, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(SHAPES[topology], dtype=dtype)
    return attach(Between(topology).to(dtype), {"r0c0": "site"}, x, layout=topology.value), x


@pytest.mark.parametrize(("topology", "name", "dtype"), CASES, ids=IDS)
def test_the_output_at_alpha_0_is_the_host_s_bit_for_bit(topology: Topology, name: str, dtype: torch.dtype) -> None:
    host = awkward(topology, dtype)
    for weights, phase, learning in itertools.product(WEIGHTS.values(), Phase, (True, False)):
        slot = SeedSlot("r0c0")
        slot.plant(born(topology, name, dtype, weights).requires_grad_(learning))
        slot.phase = phase
        assert same_bits(slot(host, host), host), (weights, phase, learning)
        with torch.no_grad():
            assert same_bits(slot(host, host), host), (weights, phase, learning)
        slot.set_alpha(1.0)
        slot.phase = Phase.BLEND
        slot.override(0.0)
        assert same_bits(slot(host, host), host), (weights, phase, learning)


def test_the_comparison_of_bits_would_see_a_zero_added() -> None:
    """What blending by arithmetic would do, and what float equality would not notice."""
    host = torch.tensor([-0.0, 1.0])
    added = host + torch.zeros(()) * torch.ones(2)
    assert torch.equal(added, host)
    assert not same_bits(added, host)


def gradients(grown: Grown, x: Tensor) -> dict[str, Tensor]:
    """Of the host's parameters and of the input, for a loss that depends on every output."""
    x = x.clone().requires_grad_()
    grown.model.zero_grad()
    output = grown.model(x)
    (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    found = {name: p.grad for name, p in grown.model.named_parameters() if not name.startswith("esper_slots")}
    assert x.grad is not None
    return {**{name: grad for name, grad in found.items() if grad is not None}, "x": x.grad}


@pytest.mark.parametrize(("topology", "name", "dtype"), CASES, ids=IDS)
def test_the_host_s_gradient_at_alpha_0_is_that_without_the_seed(
    topology: Topology, name: str, dtype: torch.dtype
) -> None:
    grown, x = between(topology, dtype)
    wanted = gradients(grown, x)
    assert all(bool(grad.isfinite().all() & (grad != 0).any()) for grad in wanted.values())
    for weights, phase in itertools.product(WEIGHTS.values(), Phase):
        slot = grown.slots["r0c0"]
        slot.plant(born(topology, name, dtype, weights))
        slot.phase = phase
        found = gradients(grown, x)
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert same_bits(found[key], wanted[key]), (key, weights, phase)
        slot.uproot()


@pytest.mark.parametrize(("topology", "name"), [pair for pair in EVERY if pair[1] != "noop"])
def test_a_learning_seed_at_alpha_0_has_a_live_and_empty_gradient(topology: Topology, name: str) -> None:
    """Every rank must see it in the reduction in every step, also in the first of a ramp."""
    grown, x = between(topology, torch.float32)
    grown.slots["r0c0"].plant(born(topology, name, torch.float32))
    grown.slots["r0c0"].phase = Phase.BLEND
    gradients(grown, x)
    seed = grown.slots["r0c0"].seed
    assert seed is not None
    for parameter in seed.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()
