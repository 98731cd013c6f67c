"""An observer that remembers: the mean of the parameters over all ticks."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.tolaria.lockstep.observers import Observer, Turn


class Averaging(Observer):
    """Keeps the mean of the host's first weight over the ticks; ``watch`` gives it the model."""

    name = "averaging"

    def __init__(self) -> None:
        self.ticks, self.mean = 0, torch.zeros(())
        self._model: nn.Module | None = None

    def watch(self, model: nn.Module) -> "Averaging":
        """The model whose weights are averaged."""
        self._model = model
        return self

    def after_follow(self, turn: Turn) -> None:
        """Takes this tick's weight in."""
        assert self._model is not None
        weight = next(iter(self._model.parameters())).detach()
        self.ticks += 1
        self.mean = self.mean + (weight - self.mean) / self.ticks

    def state_dict(self) -> dict[str, Any]:
        """Mean and count."""
        return {"ticks": self.ticks, "mean": self.mean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes them back."""
        mean: Tensor = state["mean"]
        self.ticks, self.mean = state["ticks"], mean.clone()
