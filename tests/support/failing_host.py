"""A host that raises an error of its own in a training step, with the text that its options name."""

import torch
from torch import Tensor, nn


class Failing(nn.Module):
    """Images [B, 1, H, W] -> logits [B, classes]; raises after twenty forward passes of training."""

    def __init__(self, classes: int, text: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4, classes)
        self.passes, self.text = 0, text

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            self.passes += 1
            if self.passes > 20:
                raise RuntimeError(self.text)
        return self.head(torch.relu(self.stem(x)).mean(dim=(2, 3)))


def build(input_shape: tuple[int, ...], classes: int, text: str) -> nn.Module:
    """For ``host=custom host.path=tests.support.failing_host:build``."""
    return Failing(classes, text)
