"""The batches of this rank, step by step; read ahead in workers where the data have some."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from esper.tolaria.data.own.ahead import Request
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import BatchPlan
from esper.tolaria.ranks.world import World


class Feed:
    """The batches of one rank.

    Args:
        plan: the global batches.
        world: says which share is this rank's.
        accumulate: forward passes of a step.
        total: optimizer steps of the run.
        bundle: the data.
        cursor: from an optimizer step to the place in the plan, by the agreed state.
    """

    def __init__(
        self,
        plan: BatchPlan,
        world: World,
        accumulate: int,
        total: int,
        bundle: Bundle,
        cursor: Callable[[int], int],
    ) -> None:
        self.bundle, self.plan, self.world = bundle, plan, world
        self.accumulate, self.total, self.cursor = accumulate, total, cursor
        self._ahead = bundle.train.read_ahead(plan.seed, bundle.workers) if bundle.workers else None

    def pieces(self, step: int) -> list[tuple[Tensor, Tensor]]:
        """Indices and weights of each forward pass of a step."""
        if self._ahead is not None and not self._ahead.active:
            self._ahead.begin(self._requests(step))
        return self._pieces(step)

    def _pieces(self, step: int) -> list[tuple[Tensor, Tensor]]:
        return self.plan.pieces(self.cursor(step), self.world.rank, self.world.size, self.accumulate)

    def _requests(self, step: int) -> Iterator[Request]:
        for later in range(step, self.total):
            epoch, _ = self.plan.locate(self.cursor(later))
            for indices, _weights in self._pieces(later):
                yield from self.bundle.train.requests(indices, epoch)

    def batch(self, indices: Tensor, epoch: int) -> tuple[Any, Any]:
        """One piece's inputs and targets, on the CPU; pieces are asked for in order."""
        with contextlib.nullcontext() if self._ahead is None else self._ahead.opened():
            return self.bundle.train_batch(indices, seed=self.plan.seed, epoch=epoch)

    def close(self) -> None:
        """Ends the workers."""
        if self._ahead is not None:
            self._ahead.close()
