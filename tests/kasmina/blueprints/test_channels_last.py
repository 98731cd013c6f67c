"""Channels-last stays: no feature map is copied into another layout for a seed's sake, forward or backward. Counted."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from esper.kasmina.attach import attach
from esper.kasmina.births.build import build_seed
from esper.kasmina.blueprints import registry
from esper.kasmina.blueprints.parts import group_norm
from esper.kasmina.slots.slot import Phase
from esper.leyline.alpha import Operator
from esper.leyline.topology import Topology

COPYING = ("clone", "contiguous", "copy_", "_to_copy")


class Copies(TorchDispatchMode):
    """Operators that copy a feature map, and feature maps that leave one in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.copied: list[str] = []
        self.relaid: list[str] = []
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operators.append(func._opname)
        if isinstance(result, Tensor) and result.ndim == 4 and min(result.shape[1:]) > 1:
            if func._opname in COPYING:
                self.copied.append(func._opname)
            if not result.is_contiguous(memory_format=torch.channels_last):
                self.relaid.append(func._opname)
        return result


def convolutions() -> nn.Sequential:
    """Its loss is of feature maps, so that gradients come back in channels-last. (The mean that ends `CNN` sends back
    a gradient in torch's default layout, with or without slots.)"""
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 1)]
    return nn.Sequential(*layers)


def step(blueprint: str, phase: Phase, alpha: float, operator: Operator) -> tuple[list[str], list[str]]:
    """Copies in forward and backward, and maps in another layout in forward, with a seed in every slot."""
    torch.manual_seed(0)
    model, x = convolutions(), torch.randn(4, 3, 8, 8)
    grown = attach(model, {"r0c0": "0", "r0c1": "1", "r1c0": "4"}, x)
    for slot, site in grown.sites.items():
        seed = build_seed(blueprint, dim=site.dim, topology=site.topology, key=1, dtype=torch.float32, device="cpu")
        grown.slots[slot].plant(seed)
        grown.slots[slot].phase, grown.slots[slot].operator = phase, operator
        grown.slots[slot].set_alpha(alpha)
    model.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    with Copies() as forward:
        loss = model(x).square().sum()
    with Copies() as backward:
        loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return forward.copied + backward.copied, forward.relaid


NAMES = [info.name for info in registry.catalogue(Topology.FEATURE_MAP, 8, 64)]


@pytest.mark.parametrize("blueprint", NAMES)
def test_a_seed_of_any_blueprint_copies_no_feature_map_into_another_layout(blueprint):
    through = ["clone"] * 3 if blueprint != "noop" else []  # alone, a host's feature is a copy that may be written into
    for phase, alpha, copies in ((Phase.BLEND, 0.5, []), (Phase.BLEND, 0.0, through), (Phase.STRAIGHT, 0.0, None)):
        copied, relaid = step(blueprint, phase, alpha, Operator.ADD)
        assert relaid == []
        assert copied == (["clone"] * 3 if copies is None else copies), (phase, alpha)
    assert step(blueprint, Phase.BLEND, 0.5, Operator.MULTIPLY) == ([], [])


def test_a_norm_without_gradients_runs_one_kernel_and_agrees_with_the_sums_over_a_view():
    norm = group_norm(8)
    x = torch.randn(5, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    learning = norm(x)  # no gradient for x, one for the weights: the guarded case
    with torch.no_grad(), Copies() as seen:
        measuring = norm(x)
    assert seen.operators == ["native_group_norm"]
    assert measuring.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(measuring, learning)


def test_the_count_sees_a_copy():
    class Copying(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.contiguous()

    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last)
    with Copies() as copies:
        Copying()(x)
    assert copies.copied == ["clone"]
    assert copies.relaid == ["clone"]
