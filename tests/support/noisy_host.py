"""A host with all that a second forward, a kill or a resume could disturb: dropout and running statistics.

It is no part of the product, so each process that needs it calls `register_noisy` first.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from esper.kasmina.hosts import registry
from esper.kasmina.hosts.registry import InjectionPoint
from esper.leyline.topology import Topology


@dataclass(kw_only=True, slots=True)
class NoisyConfig:
    kind: str = "noisy"


class Noisy(nn.Module):
    """Images [B, 1, H, W] -> logits [B, classes]; slots r0c0 (4 channels) and r1c0 (8)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.Dropout2d(0.2))
            for before, after in ((1, 4), (4, 8))
        )
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.drop(x.mean(dim=(2, 3))))

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        return tuple(
            InjectionPoint(slot=f"r{row}c0", module=f"stages.{row}.2", topology=Topology.FEATURE_MAP)
            for row in range(2)
        )


def build_noisy(config: NoisyConfig, *, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Noisy(classes)


def register_noisy() -> None:
    """Makes ``host.kind = noisy`` known in this process; safe to call twice."""
    registry.HOSTS["noisy"] = registry.HostKind(NoisyConfig, build_noisy)
