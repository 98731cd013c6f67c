"""Legal modules that are unlike most, and objects that stand for a scheduler or an optimizer of another library."""

from typing import Any

import torch
from torch import Tensor, nn

SHAPE = (1, 6, 6)


class Counting(nn.Linear):
    """A layer whose extra state is a dict, with a tensor in it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.calls = 0

    def get_extra_state(self) -> Any:
        return {"calls": self.calls, "names": ["a", None], "seen": torch.full((2,), float(self.calls))}

    def set_extra_state(self, state: Any) -> None:
        assert state["seen"].tolist() == [state["calls"]] * 2
        self.calls = state["calls"]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training and torch.is_grad_enabled()
        return super().forward(x)


class Bytes(nn.Linear):
    """A layer whose extra state is no plain data."""

    def get_extra_state(self) -> Any:
        return {"raw": b"123"}


class Expanded(nn.Module):
    """Buffers made by expand(), one of them under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 3)
        mask = torch.full((1,), 0.5).expand(4)
        self.register_buffer("mask", mask)
        self.register_buffer("same", mask, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)) * self.mask)


class Scaled(nn.Module):
    """For torch.jit.script."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.scale


class Ragged(nn.Module):
    """Takes sequences of unequal length as a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.inner(x.to_padded_tensor(0.0))).mean(1))


def ragged(x: Tensor) -> Tensor:
    """Images [B, 1, 6, 6] as a nested tensor [B, 2 to 5, 6]."""
    return torch.nested.nested_tensor([image[0, : 2 + i % 4] for i, image in enumerate(x)], layout=torch.jagged)


def counting(*, input_shape: tuple[int, ...] = SHAPE, classes: int = 3) -> nn.Module:
    """`Counting` in a small network; the site is ``2``."""
    width = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(nn.Flatten(), Counting(width, 8), nn.ReLU(), nn.Linear(8, classes))


class TimmLike:
    """A scheduler of timm's shape: both calls count by themselves, and the rate is a function of the counts."""

    def __init__(self, optimizer: torch.optim.Optimizer, lr: float = 0.1) -> None:
        self.optimizer, self.lr, self.epoch, self.updates = optimizer, lr, 0, 0
        for group in optimizer.param_groups:
            group["initial_lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def _write(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * 0.5**self.epoch / (1 + self.updates)

    def step(self, epoch: int, metric: float | None = None) -> None:
        self.epoch = epoch
        self._write()

    def step_update(self, num_updates: int, metric: float | None = None) -> None:
        self.updates = num_updates
        self._write()


class Accelerated(torch.optim.Optimizer):
    """A wrapper of accelerate's shape: an Optimizer by class, which passes everything on."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        return self.optimizer.state

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)


class Passing:
    """A wrapper that is no Optimizer by class."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.base = optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)
