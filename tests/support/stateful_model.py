"""A small model with every kind of state that a forward can touch, where its slots go, and a seed for them."""

import torch
from torch import Tensor, nn

from esper.kasmina.births.build import birth_key, build_seed


class Images(nn.Module):
    """Convolutions with every kind of state that a forward can touch: BatchNorm, Dropout, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.blocks = nn.ModuleList([nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Conv2d(6, 8, 1)])
        self.head = nn.Linear(8, 3)
        self.drop.eval()
        self.stem.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
VECTORS = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
WHERE = {"r1c0": "blocks.1", "r0c0": "norm", "r0c1": "blocks.0"}


def seed_for(grown, slot: str, blueprint: str = "conv_light") -> nn.Module:
    site = grown.sites[slot]
    key = birth_key(1, slot, 1)
    return build_seed(blueprint, dim=site.dim, topology=site.topology, key=key, dtype=torch.float32, device="cpu")


def images() -> Images:
    torch.manual_seed(5)
    return Images()
