"""A host that cannot learn its task without a seed: it sees every pixel, but none beside another.

A frozen 1x1 convolution lifts pixels to channels; the head reads their mean over the image, so what it can tell apart
are histograms of brightness. A seed with a 3x3 convolution between the two sees shapes.
"""

import torch
from torch import Tensor, nn


class Flat(nn.Module):
    """[B, 1, H, W] -> logits [B, classes]."""

    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.lift = nn.Conv2d(1, width, 1)
        for parameter in self.lift.parameters():
            parameter.requires_grad_(False)
        self.head = nn.Linear(width, classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits from the mean of the lifted pixels."""
        return self.head(torch.relu(self.lift(x_BCHW)).mean(dim=(2, 3)))


def build(input_shape: tuple[int, ...], classes: int, width: int = 8) -> nn.Module:
    """For ``host=custom host.path=tests.support.histogram_host:build``."""
    return Flat(classes, width)
