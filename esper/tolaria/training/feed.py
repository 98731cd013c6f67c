"""The batches of this rank, step by step; read ahead in workers where the data have some.

A step's loss is the sum of its samples' losses over their number, or under ``normalise=tokens`` the sum over all
positions over theirs. How many positions count only the targets of all ranks know: so a step's pieces are read first,
and one scalar is reduced over the data group.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from esper.tolaria.data.own.ahead import Ahead, Request
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
        self.bundle, self.plan, self.world, self.task = bundle, plan, world, bundle.learns
        self.accumulate, self.total, self.cursor = accumulate, total, cursor
        self._whole = False  # whether batches come whole, rather than what lies beneath the training part
        self._ahead = self._begin_ahead() if bundle.workers else None
        self._held: deque[tuple[Any, Any]] = deque()
        self._waited_ms = 0.0

    def _begin_ahead(self) -> Ahead:
        seed, workers, pinned = self.plan.seed, self.bundle.workers, self.world.device.type == "cuda"
        beneath = self.bundle.train.read_ahead(seed, workers, pinned=pinned)
        self._whole = beneath is None
        return Ahead(self.bundle.reader(seed), workers, pinned=pinned) if beneath is None else beneath

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
                if self._whole:
                    yield indices, epoch
                else:
                    yield from self.bundle.train.requests(indices, epoch)

    def scale(self, step: int, pieces: Sequence[tuple[Tensor, Tensor]], epoch: int) -> float:
        """The factor of a rank's weighted sum of losses: the number of ranks over the global number of samples, or of
        positions. DDP's mean over ranks is then the global mean, whatever the shards' sizes.

        Args:
            step: optimizer step.
            pieces: of the step.
            epoch: pass over the data.
        """
        if self.task is None or not self.task.by_positions:
            return self.world.size / len(self.plan.indices(self.cursor(step)))
        self._held = deque(self._read(indices, epoch) for indices, _ in pieces)
        held = zip(self._held, pieces, strict=True)
        parts = [(self.task.count(y) * weights.double()).sum() for (_, y), (_, weights) in held]
        number = self.world.put(torch.stack(parts).sum()[None])
        self.world.all_reduce(number, dist.ReduceOp.SUM, what="normalise", on="data")
        return self.world.size / max(float(number), 1.0)

    def batch(self, indices: Tensor, epoch: int) -> tuple[Any, Any]:
        """One piece's inputs and targets, on the CPU; pieces are asked for in order."""
        return self._held.popleft() if self._held else self._read(indices, epoch)

    def _read(self, indices: Tensor, epoch: int) -> tuple[Any, Any]:
        began = time.perf_counter()
        with contextlib.nullcontext() if self._ahead is None else self._ahead.opened():
            found = self._ahead.take(indices, epoch) if self._whole and self._ahead is not None else None
            if found is None:
                found = self.bundle.train_batch(indices, seed=self.plan.seed, epoch=epoch)
        self._waited_ms += 1e3 * (time.perf_counter() - began)
        return found

    def take_waited_ms(self) -> float:
        """Milliseconds that this rank has waited for data since it was asked last."""
        waited, self._waited_ms = self._waited_ms, 0.0
        return waited

    def close(self) -> None:
        """Ends the workers."""
        if self._ahead is not None:
            self._ahead.close()
