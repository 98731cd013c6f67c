"""Snapshots in memory: lasting CPU buffers, overwritten in turn, so that a snapshot costs a copy and no allocation.

A snapshot is *cleared* once a later healthy tick has confirmed it. Snapshots are taken at healthy ticks only, and a
healthy tick clears all before it. So at most the newest is not cleared, and the oldest may always be overwritten.

What is equal on all ranks may lie where all ranks of a machine can read it (see `esper.tolaria.checkpoint.shared`); a
rank's own part, and its controller, always lie in buffers of its own.
"""

import copy
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

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


class Copier(Protocol):
    """Keeps a copy; see `HostCopy`."""

    def take(self, payload: Any) -> Any:
        """Copies a payload; what it copied before is gone."""

    def ready(self) -> None:
        """Waits until the copy has arrived."""

    def read(self, copied: Any) -> Any:
        """What ``take`` returned, with its tensors."""


@dataclass(slots=True)
class _Buffers:
    common: Copier
    own: HostCopy = field(default_factory=HostCopy)


@dataclass(slots=True)
class _Copies:
    generation: Generation
    buffers: _Buffers
    filled: dict[str, Tensor]  # of the model, by this rank itself


def _bytes_of(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


class Ring:
    """The newest snapshots of one rank.

    Args:
        size: how many are kept; at least 2.
        shared: where the common part of each lies, if that is shared; without them, in buffers of this rank.

    Fields:
        bytes: of the newest one.
        own_bytes: those of them that are not shared.
    """

    def __init__(self, size: int, shared: Sequence[Copier] = ()) -> None:
        self.size, self.bytes, self.own_bytes, self.shares = size, 0, 0, bool(shared)
        self._held: list[_Copies] = []  # oldest first
        self._free = [_Buffers(copier) for copier in reversed(shared or [HostCopy() for _ in range(size)])]

    def __len__(self) -> int:
        return len(self._held)

    def take(
        self, state: RunState, common: dict[str, Any], own: dict[str, Any], apart: Collection[str] = ()
    ) -> tuple[int, float]:
        """Copies a state; overwrites the oldest one if the ring is full.

        Args:
            state: the agreed record.
            common: living tensors and plain data that are equal on all ranks.
            own: those that are this rank's own.
            apart: names of tensors of the model that each rank may have filled by itself.

        Returns:
            Bytes, and milliseconds for which the caller waited.
        """
        began = time.perf_counter()
        if len(self._held) == self.size:
            self._free.append(self._held.pop(0).buffers)
        buffers = self._free.pop()
        model: dict[str, Tensor] = common["model"]
        equal = {key: value for key, value in common.items() if key != "controller"}  # rank 0's may differ
        equal["model"] = {name: tensor for name, tensor in model.items() if name not in apart}
        filled = {name: tensor for name, tensor in model.items() if name in apart}
        twins = buffers.common.take(equal)
        mine = buffers.own.take({"own": own, "controller": common["controller"], "filled": filled})
        twins["controller"] = mine["controller"]
        generation = Generation(state, twins, mine["own"], f"snapshot of step {state.step}", "ram")
        self._held.append(_Copies(generation, buffers, mine["filled"]))
        self.bytes = _bytes_of([twins, mine["own"], mine["filled"]])
        self.own_bytes = _bytes_of(mine) if self.shares else self.bytes
        return self.bytes, 1e3 * (time.perf_counter() - began)

    def confirm(self, tick: int) -> None:
        """Clears every snapshot before a healthy tick."""
        for held in self._held:
            if held.generation.state.tick < tick and not held.generation.cleared:
                held.buffers.common.ready()  # whoever shares it may go back to it from the next tick on
                held.generation.cleared = True

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
        held.buffers.common.ready()
        held.buffers.own.ready()
        generation = held.generation
        controller = copy.deepcopy(generation.common["controller"])  # whoever loads it may change it
        equal = {key: value for key, value in generation.common.items() if key != "controller"}
        common = held.buffers.common.read(equal)
        common["model"] = {**common["model"], **held.filled}
        return Generation(
            generation.state,
            {**common, "controller": controller},
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
