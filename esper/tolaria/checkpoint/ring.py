"""Snapshots in memory: standing host buffers, written over in turn, so that a snapshot costs a copy and no allocation.

A snapshot is *cleared* once a later healthy tick has confirmed it. They are taken at healthy ticks only, and a healthy
tick clears all before it: so at most the newest is not cleared, and the oldest may always be written over.
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
        state: the agreed record. common, own: what is equal on all ranks, and what is this rank's; as in a checkpoint.
        where: what an error calls it. source: "ram" or "disk". cleared: a later healthy tick has confirmed it.
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
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._held: list[_Copies] = []  # oldest first
        self._free: list[HostCopy] = []

    def __len__(self) -> int:
        return len(self._held)

    def take(self, state: RunState, common: dict[str, Any], own: dict[str, Any]) -> tuple[int, float]:
        """Copies a state, over the oldest one when the ring is full.

        Args:
            state: the agreed record. common, own: living tensors and plain data.

        Returns:
            Bytes, and milliseconds that the copy took the caller.
        """
        began = time.perf_counter()
        if len(self._held) == self.size:
            self._free.append(self._held.pop(0).buffers)
        buffers = self._free.pop() if self._free else HostCopy()
        twins = buffers.take({"common": common, "own": own})
        generation = Generation(state, twins["common"], twins["own"], f"snapshot of step {state.step}", "ram")
        self._held.append(_Copies(generation, buffers))
        size = sum(leaf.nbytes for leaf in tree_iter(twins) if isinstance(leaf, Tensor))
        return size, 1e3 * (time.perf_counter() - began)

    def confirm(self, tick: int) -> None:
        """The tick is healthy: what was taken before it is cleared."""
        for held in self._held:
            held.generation.cleared |= held.generation.state.tick < tick

    def newest(self, back: int, *, from_step: int = 0) -> Generation | None:
        """The ``back``-th newest cleared snapshot, or the oldest if there are fewer; None without any.

        Args:
            back: from 1. from_step: older ones are no choice.

        Returns:
            Its tensors are the standing buffers, to be copied from; its plain data stands for itself.
        """
        cleared = [h for h in self._held if h.generation.cleared and h.generation.state.step >= from_step]
        if not cleared:
            return None
        held = cleared[max(0, len(cleared) - back)]
        held.buffers.ready()
        generation = held.generation
        controller = copy.deepcopy(generation.common["controller"])  # who loads it may go on to change it
        return Generation(
            generation.state,
            {**generation.common, "controller": controller},
            generation.own,
            generation.where,
            "ram",
            cleared=True,
        )

    def forget_after(self, step: int) -> None:
        """Lets go of what was taken after ``step``: that never happened."""
        for held in [held for held in self._held if held.generation.state.step > step]:
            self._held.remove(held)
            self._free.append(held.buffers)
