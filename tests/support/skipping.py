"""Hosts with a site that does not run in every forward, or runs without gradients; the site is ``site``."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS = ("branch", "no_grad", "cut", "reentrant", "always", "never")


class Skipping(nn.Module):
    """Inputs [B, 6] to logits; the site has no parameters of its own, so that nobody else misses a gradient.

    Args:
        kind: ``branch`` runs the site unless `skip` is set in train(), ``drop`` at random in train(), ``no_grad`` runs
            it without gradients, ``never`` in no forward, ``cut`` cuts its output off, ``reentrant`` runs it in such a
            segment.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.kind, self.skip = kind, False
        self.stem, self.site, self.head = nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        left_out = self.skip if self.kind == "branch" else self.kind == "drop" and float(torch.rand(())) < 0.7
        if self.kind == "never" or (self.training and left_out):
            return self.head(x)
        if self.kind == "no_grad":
            with torch.no_grad():
                y = self.site(x)
        elif self.kind == "reentrant":
            y = torch.utils.checkpoint.checkpoint(self.site, x, use_reentrant=True) if x.requires_grad else self.site(x)
        else:
            y = self.site(x)
        return self.head(x + (y.detach() if self.kind == "cut" else y))


def batches(count: int, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    stream = torch.Generator().manual_seed(start)
    return [(torch.randn(8, 6, generator=stream), torch.randint(0, 3, (8,), generator=stream)) for _ in range(count)]


def ask(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")
