"""A grown model of linear layers, its owner of parameters, and gradients that depend on name and step alone."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from esper.kasmina.attach import attach
from esper.kasmina.slots.grown import Grown
from esper.tolaria.growth.config import OptimConfig, OptimizerKind
from esper.tolaria.growth.guard import Judgement, StepReport
from esper.tolaria.growth.ownership import ParameterOwner

NAN, INF = math.nan, math.inf
STEPS = 40
ADAMW = OptimConfig(
    kind=OptimizerKind.ADAMW, lr=0.01, weight_decay=0.1, clip_norm=None, seed_lr_scale=1.0, seed_warmup_steps=0
)
SGD = replace(ADAMW, kind=OptimizerKind.SGD)
FUSED = [replace(config, fused=True) for config in (ADAMW, SGD)]
KINDS = pytest.mark.parametrize("config", [ADAMW, SGD, *FUSED], ids=["adamw", "sgd", "fused adamw", "fused sgd"])
SITES = {"r0c0": "layers.0", "r0c1": "layers.1", "r1c0": "layers.2"}


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


def grown_host() -> Grown:
    torch.manual_seed(0)
    return attach(Host(), SITES, torch.randn(2, 3))


def birth(grown: Grown, owner: ParameterOwner, slot: str, *, learning: bool = True) -> None:
    torch.manual_seed(int(slot[1]) * 10 + int(slot[3]))
    grown.slots[slot].plant(nn.Linear(3, 3))
    owner.register(slot)
    owner.set_learning(slot, learning)


def give_gradients(grown: Grown, step: int, size: float = 1.0) -> dict[str, Tensor]:
    """Gradients that depend on name and step alone; returns copies by name."""
    found = {}
    for name, parameter in grown.model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(sum(map(ord, name)) * 1000 + step)
            parameter.grad = size * torch.randn(parameter.shape, generator=generator)
            found[name] = parameter.grad.clone()
    return found


def train(grown: Grown, owner: ParameterOwner, steps: range, learn_steps: dict[str, int] | None = None) -> None:
    for step in steps:
        give_gradients(grown, step)
        owner.set_lr(step, learn_steps or {})
        owner.step()


def told(step: StepReport | Judgement) -> StepReport:
    """What happened in a step, whenever it is known."""
    return step if isinstance(step, StepReport) else step.read()


def values(grown: Grown) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in grown.model.named_parameters()}


def moments(owner: ParameterOwner) -> dict[str, Tensor]:
    return {f"{name}.{key}": t for name, entry in owner.state_by_name().items() for key, t in entry.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def owners(owner: ParameterOwner) -> list[str]:
    return [group["owner"] for group in owner.optimizer.param_groups]
