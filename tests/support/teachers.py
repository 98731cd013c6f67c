"""Teachers of the user's own, named ``tests.support.teachers:NAME`` in a config."""

import os

import torch
from torch import Tensor, nn


class Teaching(nn.Module):
    """Images [B, 1, H, W] -> logits; ``stem`` gives features [B, 4, H, W]. Dropout and running statistics, which a
    teacher must not use as in training."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4 * 16, classes)
        self.norm.running_mean.uniform_(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.norm(self.stem(x)).relu(), 4)
        return 4.0 * self.head(self.drop(x.flatten(1)))


def teach(*, input_shape: tuple[int, ...], classes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Teaching(classes)


class Naming(nn.Module):
    """Names what it sees."""

    def forward(self, x: Tensor) -> str:
        return "images"


class Telling(Teaching):
    """Has a part whose output is no tensor."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        self.name = Naming()

    def forward(self, x: Tensor) -> Tensor:
        self.name(x)
        return super().forward(x)


def tell(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Telling(classes)


def teach_each_rank_otherwise(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return teach(input_shape=input_shape, classes=classes, seed=int(os.environ.get("RANK", "0")))


def count_too_few(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Teaching(classes - 1)


def not_a_number(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    made = Teaching(classes)
    nn.init.constant_(made.head.bias, float("nan"))
    return made


class Speaking(nn.Module):
    """Tokens [B, T] -> logits [B, T, V]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(classes, 8)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).cumsum(1).tanh())


def speak(*, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    torch.manual_seed(5)
    return Speaking(classes)
