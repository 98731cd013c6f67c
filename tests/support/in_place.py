"""Hosts that work in place, each with a twin that computes the same without; the site is ``site``.

relu    ReLU(inplace=True) behind a convolution: VGG, AlexNet, most of timm
norm    the same behind a normalisation
add     y = block(x); y += x
slice   a part of the feature is overwritten
input   the host writes into the batch that it is given
block   a block whose first layer works in place, which a compiler takes whole
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("relu", "norm", "add", "slice", "input", "block")
C, CLASSES = 4, 3


class Host(nn.Module):
    """A small convolutional network of one of these kinds.

    Args:
        kind: one of `KINDS`.
        in_place: False makes the twin.
    """

    def __init__(self, kind: str, in_place: bool = True, channels: int = 1) -> None:
        super().__init__()
        self.kind, self.in_place = kind, in_place
        self.stem = nn.Conv2d(channels, C, 3, padding=1)
        self.site = nn.GroupNorm(2, C) if kind == "norm" else nn.Conv2d(C, C, 3, padding=1)
        self.act = nn.Identity() if kind == "block" else nn.ReLU(inplace=in_place)
        first = nn.ReLU(inplace=in_place) if kind == "block" else nn.SiLU()
        self.block = nn.Sequential(first, nn.Dropout(0.2), nn.Conv2d(C, C, 3, padding=1), nn.Tanh())
        self.head = nn.Linear(C, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "input":
            x = x.sub_(0.5).mul_(2.0) if self.in_place else x.sub(0.5).mul(2.0)
        below = torch.tanh(self.stem(x))
        y = self.site(below)
        if self.kind == "add":
            if self.in_place:
                y += below
            else:
                y = y + below
        elif self.kind == "slice":
            if self.in_place:
                y[:, :2].mul_(0.5)
                y[:, 3] = 0.25
            else:
                last = torch.full_like(y[:, 3:], 0.25)
                y = torch.cat([y[:, :2].mul(0.5), y[:, 2:3], last], dim=1)
        return self.head(self.block(self.act(y)).mean((2, 3)))


def twins(kind: str, dtype: torch.dtype = torch.float32) -> tuple[Host, Host]:
    """The host that works in place and the one that does not, with the same weights."""
    made = []
    for in_place in (True, False):
        torch.manual_seed(2)
        made.append(Host(kind, in_place).to(dtype))
    return made[0], made[1]


def images(samples: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(samples, 1, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


def ask(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A user's loss: per sample, and whether it was right."""
    output = model(batch[0])
    return F.cross_entropy(output, batch[1], reduction="none"), (output.argmax(1) == batch[1]).double()


def build(*, input_shape: tuple[int, ...], classes: int, kind: str, in_place: bool) -> nn.Module:
    """For a run with a host of one's own."""
    host = Host(kind, in_place, input_shape[0])
    host.head = nn.Linear(C, classes)
    return host
