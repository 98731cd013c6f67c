"""What training a policy needs of the ranks: to add numbers up. The engine's `World` has it; one process is `Alone`."""

from typing import Any, Protocol

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
