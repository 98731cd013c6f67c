"""Snapshots in memory: lasting CPU buffers, overwritten in turn, so that a snapshot costs a copy and no allocation.

A snapshot is *cleared* once a later healthy tick has confirmed it. Snapshots are taken at healthy ticks only, and a
healthy tick clears all before it. So at most the newest is not cleared, and the oldest may always be overwritten.
"""

import copy
import time
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter

from esper.accord.state import RunState
from esper.tolaria.checkpoint.hostcopy import HostCopy


@dataclass(slots=True)
class Generation:
    """A state of a whole run on one rank, to go back to.

    Fields:
        state: the agreed record.
        common: everything that is equal on all ranks, as in a checkpoint.
        own: everything that is this rank's own, as in a checkpoint; None if it is not known.
        where: its name in an error.
        source: "ram" or "disk".
        cleared: whether a later healthy tick has confirmed it.
    """

    state: RunState
    common: dict[str, Any]
    own: dict[str, Any] | None
    where: str
    source: str
    cleared: bool = False


@dataclass(slots=True)
class _Copies:
    generation: Generation
    buffers: HostCopy = field(default_factory=HostCopy)


class Ring:
    """The newest snapshots of one rank.

    Args:
        size: how many are kept; at least 2.

    Fields:
        bytes: of the newest one.
    """

    def __init__(self, size: int) -> None:
        self.size, self.bytes = size, 0
        self._held: list[_Copies] = []  # oldest first
        self._free: list[HostCopy] = []

    def __len__(self) -> int:
        return len(self._held)

    def take(self, state: RunState, common: dict[str, Any], own: dict[str, Any]) -> tuple[int, float]:
        """Copies a state; overwrites the oldest one if the ring is full.

        Args:
            state: the agreed record.
            common: living tensors and plain data that are equal on all ranks.
            own: those that are this rank's own.

        Returns:
            Bytes, and milliseconds for which the caller waited.
        """
        began = time.perf_counter()
        if len(self._held) == self.size:
            self._free.append(self._held.pop(0).buffers)
        buffers = self._free.pop() if self._free else HostCopy()
        twins = buffers.take({"common": common, "own": own})
        generation = Generation(state, twins["common"], twins["own"], f"snapshot of step {state.step}", "ram")
        self._held.append(_Copies(generation, buffers))
        self.bytes = sum(leaf.nbytes for leaf in tree_iter(twins) if isinstance(leaf, Tensor))
        return self.bytes, 1e3 * (time.perf_counter() - began)

    def confirm(self, tick: int) -> None:
        """Clears every snapshot before a healthy tick."""
        for held in self._held:
            held.generation.cleared |= held.generation.state.tick < tick

    def newest(self, back: int, *, from_step: int = 0) -> Generation | None:
        """The ``back``-th newest cleared snapshot, or the oldest if there are fewer; None if there is none.

        Args:
            back: 1 for the newest.
            from_step: optimizer step before which no snapshot is chosen.

        Returns:
            The snapshot. Its tensors are the ring's buffers, to be copied from; its plain data is a copy.
        """
        cleared = [h for h in self._held if h.generation.cleared and h.generation.state.step >= from_step]
        if not cleared:
            return None
        held = cleared[max(0, len(cleared) - back)]
        held.buffers.ready()
        generation = held.generation
        controller = copy.deepcopy(generation.common["controller"])  # whoever loads it may change it
        return Generation(
            generation.state,
            {**generation.common, "controller": controller},
            generation.own,
            generation.where,
            "ram",
            cleared=True,
        )

    def forget_after(self, step: int) -> None:
        """Drops the snapshots after ``step``, which belong to a course that the run has left."""
        for held in [held for held in self._held if held.generation.state.step > step]:
            self._held.remove(held)
            self._free.append(held.buffers)
