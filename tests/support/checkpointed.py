"""A stack of blocks that are computed again in backward, in each form of torch's activation checkpointing.

    plain       nothing is computed again: the twin
    plain form  torch.utils.checkpoint.checkpoint(..., use_reentrant=False), the default
    reentrant   torch.utils.checkpoint.checkpoint(..., use_reentrant=True)
    closure     one segment around a function that runs two blocks
    nested      a segment within a segment

Sites: before, inside and behind a segment.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

FORMS = ("default", "reentrant", "closure", "nested")
SITES = {"before": "stem", "inside": "blocks.1.first", "whole": "blocks.1", "behind": "tail"}
C, T, CLASSES = 8, 3, 3


class Block(nn.Module):
    def __init__(self, drop: float) -> None:
        super().__init__()
        self.norm, self.first, self.drop, self.second = (
            nn.LayerNorm(C),
            nn.Linear(C, 2 * C),
            nn.Dropout(drop),
            nn.Linear(2 * C, C),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.drop(torch.tanh(self.first(self.norm(x)))))


class Stack(nn.Module):
    """Inputs [B, T, inputs] to logits.

    Args:
        form: one of `FORMS`, or "plain".
        drop: rate of the dropout in every block.
    """

    def __init__(self, form: str, drop: float = 0.3, inputs: int = 5, classes: int = CLASSES) -> None:
        super().__init__()
        self.form = form
        self.stem, self.tail, self.head = nn.Linear(inputs, C), nn.Tanh(), nn.Linear(C, classes)
        self.blocks = nn.ModuleList(Block(drop) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(len(x), -1, self.stem.in_features))  # rows of an image are a sequence too
        again = partial(checkpoint, use_reentrant=self.form == "reentrant")
        if self.form == "plain" or not torch.is_grad_enabled():
            for block in self.blocks:
                x = block(x)
        elif self.form == "closure":
            x = self.blocks[2](again(lambda y: self.blocks[1](self.blocks[0](y)), x))
        elif self.form == "nested":
            x = again(lambda y: self.blocks[2](again(self.blocks[1], self.blocks[0](y))), x)
        else:
            for block in self.blocks:
                x = again(block, x)
        return self.head(self.tail(x).mean(1))


def twins(form: str, **options: Any) -> tuple[Stack, Stack]:
    """The stack in a form, and the one that computes nothing again, with the same weights."""
    made = []
    for each in (form, "plain"):
        torch.manual_seed(2)
        made.append(Stack(each, **options))
    return made[0], made[1]


def sequences(samples: int = 4) -> Tensor:
    return torch.randn(samples, T, 5, generator=torch.Generator().manual_seed(1))


def ask(model: Any, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """A user's loss: per sample, and whether it was right."""
    output = model(batch[0])
    return F.cross_entropy(output, batch[1], reduction="none"), (output.argmax(1) == batch[1]).double()


def build(*, input_shape: tuple[int, ...], classes: int, form: str) -> nn.Module:
    """For a run with a host of one's own on images, whose rows are the sequence."""
    return Stack(form, inputs=input_shape[-1], classes=classes)
