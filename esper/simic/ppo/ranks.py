"""What training a policy needs of the ranks: to add numbers up. The engine's `World` has it; one process is `Alone`."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX


class Ranks(Protocol):
    """This process's place among the ranks, and the one collective that is used."""

    rank: int
    size: int

    def all_reduce(self, vector: Tensor, op: Any, *, what: str) -> Tensor:
        """Reduces a CPU tensor over all ranks, in place, and returns it.

        Args:
            vector: of equal shape on every rank.
            op: `SUM` or `MAX`.
            what: name of the phase, for an error.
        """


class Alone:
    """One process: reducing is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, vector: Tensor, op: Any, *, what: str) -> Tensor:
        """Returns ``vector`` as it is."""
        return vector


def add_gradients(parameters: Sequence[Tensor], sums: Tensor, ranks: Ranks) -> Tensor:
    """Leaves the sum of all ranks' gradients in the parameters, in one collective; returns the sum of all ``sums``.

    Args:
        parameters: a gradient of None counts as zeros, since a rank may have no row of a minibatch.
        sums: float64 vector on the CPU that travels along.
        ranks: which add up.
    """
    flat = ranks.all_reduce(torch.cat([*map(_flat_gradient, parameters), sums]), SUM, what="gradient")
    *gradients, total = flat.split([*(parameter.numel() for parameter in parameters), len(sums)])
    for parameter, gradient in zip(parameters, gradients):
        parameter.grad = gradient.to(parameter.device, parameter.dtype).reshape(parameter.shape)
    return total


def _flat_gradient(parameter: Tensor) -> Tensor:
    """The gradient as a flat float64 vector on the CPU."""
    gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return gradient.detach().double().flatten().cpu()
