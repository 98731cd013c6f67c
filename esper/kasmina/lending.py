"""Runs a model on other tensors than its own, forward and backward; the gradients stay with whoever lent them."""

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

R = TypeVar("R")


class _Around(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, act: Callable[[], Any]) -> Any:
        return act()


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], act: Callable[[], R]) -> R:
    """Calls ``act`` while the model has these tensors in place of its own parameters and buffers, by name.

    Forward and backward may both be run in it, which `torch.func.functional_call` alone does not allow.
    """
    result: R = torch.func.functional_call(_Around(model), {f"model.{name}": t for name, t in tensors.items()}, (act,))
    return result


def stand_ins(model: nn.Module) -> dict[str, Tensor]:
    """Leaves on the memory of every parameter that learns, by name: a backward to them leaves the model's own alone."""
    return {name: nn.Parameter(p.detach()) for name, p in model.named_parameters() if p.requires_grad}


_NO_GRADIENT = ("ignore", re.compile("None of the inputs have requires_grad", re.IGNORECASE), UserWarning, None, 0)


def hush() -> None:
    """Has torch not warn of reentrant segments of which no input needs a gradient: a shadow forward means it so.

    For good: to end a filter makes Python repeat every warning that it has given once. A host of which it is true has
    been told so in its own first forward.
    """
    if _NO_GRADIENT not in warnings.filters:
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad", UserWarning)
