"""Runs that diverge: training samples that drive the loss away, and seeds that do.

No part of the product, so each process that needs them calls `spoil_data` or `register_bomb` first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.blueprints import registry
from esper.kasmina.blueprints.registry import blueprint
from esper.kasmina.hosts import CustomHostConfig
from esper.leyline.topology import Topology
from esper.tolaria.data.parts import Part
from esper.tolaria.training.engine import Engine


class Spoiled(Part):
    """A part some of whose samples are multiplied by ``factor``."""

    def __init__(self, part: Part, bad: Sequence[int], factor: float) -> None:
        self.part, self.bad, self.factor = part, torch.tensor(bad), factor

    def __len__(self) -> int:
        return len(self.part)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.part.fetch(indices)
        hit = torch.isin(indices, self.bad).view(-1, *[1] * (x.ndim - 1))
        return torch.where(hit, x * self.factor, x), y

    def content(self) -> tuple[Tensor, ...]:
        return self.part.content()


def spoil_data(engine: Engine, steps: range, factor: float, *, share: slice = slice(None)) -> None:
    """The samples of these optimizer steps are spoiled, wherever they come.

    Args:
        share: which of each global batch.
    """
    bad = [index for step in steps for index in engine.plan.indices(step)[share].tolist()]
    object.__setattr__(engine.bundle, "train", Spoiled(engine.bundle.train, bad, factor))


class Bomb(nn.Module):
    """A seed that learns nothing and gives a feature map of ``weight`` times a stripe: harmless until it is blended."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 3e3))

    def forward(self, x: Tensor) -> Tensor:
        stripe = torch.linspace(-1.0, 1.0, x.shape[1], dtype=x.dtype, device=x.device).view(1, -1, 1, 1)
        return self.weight * stripe * torch.ones_like(x)


def register_bomb() -> None:
    """Makes the blueprint ``bomb`` known in this process; safe to call twice."""
    if "bomb" not in registry.all_names():
        blueprint("bomb", topology=Topology.FEATURE_MAP, parameters=lambda dim: 1, flops=lambda dim, positions: 0)(Bomb)


class Plain(nn.Module):
    """Images [B, C, H, W] -> logits [B, classes], without any norm that would swallow a scale."""

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(16 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x)).flatten(1))
        return out


def plain(input_shape: tuple[int, ...], classes: int, width: int = 8) -> nn.Module:
    """A host of the user's own: slots at its two stages on images of 8 x 8."""
    return Plain(input_shape[0], classes, width)


PLAIN = CustomHostConfig(path="tests.support.diverging_runs:plain", sites={"r0c0": "first", "r1c0": "second"})

# Settings by which such a run is rolled back soon: snapshots at every second tick, verdicts after four.
GUARDED: dict[str, Any] = {
    "optim__kind": "sgd",
    "optim__lr": 0.05,
    "optim__clip_norm": None,
    "telemetry__level": "full",
    "governor__min_history": 4,
    "governor__snapshot_ticks": 2,
}
