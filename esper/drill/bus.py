"""Ranks of one process, each a thread, and the collectives between them.

One rank runs at a time, until it enters a collective or ends; then another one runs, drawn from a seeded stream. So
ranks arrive in any order that delays could give them, and a run repeats exactly. A collective is carried out once every
rank has entered it, on the vectors that the ranks themselves encoded:

    all_reduce   SUM, MAX or MIN over the ranks' tensors, written back into each
    all_gather   the ranks' tensors in rank order

A breach of the protocol raises `ProtocolBroken`: ranks meet in different collectives or with tensors of different
shapes (over gloo that returns wrong numbers without an error), or a rank ends while others wait for it. A rank may be
lost (`Lost`), as by a kill. Then the others' collective fails as a transport does, and from there on they run freely,
since it takes them time to name the missing rank.

Everything above the transport is the shipped `World`: error texts, texts as rows of bytes, the naming of missing ranks.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from esper.tolaria.ranks.heartbeat import Heartbeat, Mark, patience
from esper.tolaria.ranks.world import World

T = TypeVar("T")
_REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "all_reduce SUM": lambda rows: rows.sum(0),
    "all_reduce MAX": lambda rows: rows.amax(0),
    "all_reduce MIN": lambda rows: rows.amin(0),
}
STACK_BYTES = 1 << 20  # of a rank's thread; a thousand of them must fit


class Lost(BaseException):
    """Raised in a rank to remove it without a message, as a kill does."""


class ProtocolBroken(Exception):
    """Ranks did not enter the same collectives; the text says which rank did what."""


@dataclass(frozen=True, slots=True)
class Call:
    """A rank's call of a collective: kind with its operation, phase, group, and the tensor that it sends."""

    kind: str
    what: str
    on: str
    tensor: Tensor

    def __str__(self) -> str:
        return f"{self.kind} of {self.what} on {self.on}, {self.tensor.dtype} {tuple(self.tensor.shape)}"


@dataclass(slots=True)
class RankEnd(Generic[T]):
    """The end of a rank.

    Fields:
        value: result of its function; None if it raised or was lost.
        error: the exception that it raised, or None.
        lost: whether it was removed.
        calls: phases of the collectives that it entered, in order.
        sent: bytes of the tensors that it sent, in the same order.
        seconds: CPU time of its thread.
    """

    value: T | None = None
    error: BaseException | None = None
    lost: bool = False
    calls: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)
    seconds: float = 0.0


class Bus:
    """Runs a function on every rank of a group.

    Args:
        size: number of ranks.
        seed: decides the order in which they run.
    """

    def __init__(self, size: int, *, seed: int = 0) -> None:
        self.size = size
        self.marks: list[Mark | None] = [None] * size
        self.told = threading.Event()  # a rank failed by itself, or all but one, or all, have told of an error
        self._erring: set[int] = set()
        self._marking = threading.Lock()
        self._random = random.Random(seed)
        self._go = [threading.Semaphore(0) for _ in range(size)]
        self._back = threading.Semaphore(0)
        self._calls: list[Call | None] = [None] * size
        self._rows: Tensor | None = None
        self._ends: list[RankEnd[Any]] = []
        self._over: set[int] = set()
        self._cut = False

    def run(self, fn: Callable[["RankWorld"], T]) -> list[RankEnd[T]]:
        """Runs ``fn(world)`` once on every rank; returns how each ended, in rank order.

        Raises:
            ProtocolBroken: see the module.
        """
        self._ends = [RankEnd() for _ in range(self.size)]
        before = threading.stack_size(STACK_BYTES)
        try:
            threads = [threading.Thread(target=self._rank, args=(rank, fn), daemon=True) for rank in range(self.size)]
            for thread in threads:
                thread.start()
        finally:
            threading.stack_size(before)
        try:
            self._schedule()
        finally:
            self._cut = True
            for rank in range(self.size):
                self._go[rank].release()
            for thread in threads:
                thread.join()
        return self._ends

    def put_mark(self, mark: Mark) -> None:
        """Takes the latest mark of a rank."""
        with self._marking:
            self.marks[mark.rank] = mark
            if not mark.error:
                self._erring.discard(mark.rank)
                return
            self._erring.add(mark.rank)
            if not mark.is_victim or len(self._erring) >= self.size - 1:
                self.told.set()

    def _rank(self, rank: int, fn: Callable[["RankWorld"], Any]) -> None:
        end = self._ends[rank]
        self._go[rank].acquire()
        try:
            end.value = fn(RankWorld(self, rank))
        except Lost:
            end.lost = True
        except BaseException as error:
            end.error = error
        end.seconds = time.thread_time()
        self._over.add(rank)
        self._back.release()

    def _schedule(self) -> None:
        ready = list(range(self.size))
        while ready:
            self._random.shuffle(ready)
            for rank in ready:
                self._go[rank].release()
                self._back.acquire()
            waiting = [rank for rank in range(self.size) if rank not in self._over]
            if len(waiting) < self.size:
                self._check_ended(waiting)
                return
            self._carry_out()
            ready = waiting

    def _check_ended(self, waiting: list[int]) -> None:
        gone = [rank for rank in sorted(self._over) if not self._ends[rank].lost]
        if waiting and gone:
            where = {str(self._calls[rank]) for rank in waiting}
            error = self._ends[gone[0]].error
            raise ProtocolBroken(
                f"rank {', '.join(map(str, gone))} ended ({'returned' if error is None else repr(error)}) while rank "
                f"{', '.join(map(str, waiting))} waits in {'; '.join(sorted(where))}"
            )

    def _carry_out(self) -> None:
        calls = [call for call in self._calls if call is not None]
        ranks_by_call: dict[str, list[int]] = {}
        for rank, call in enumerate(calls):
            ranks_by_call.setdefault(str(call), []).append(rank)
        if len(ranks_by_call) > 1:
            parts = [f"rank {', '.join(map(str, ranks))} in {text}" for text, ranks in ranks_by_call.items()]
            raise ProtocolBroken(f"ranks met in different collectives: {'; '.join(parts)}")
        rows = torch.stack([call.tensor for call in calls])
        if calls[0].kind == "all_gather":
            self._rows = rows
            return
        reduced = _REDUCE[calls[0].kind](rows)
        for call in calls:
            call.tensor.copy_(reduced)

    def calls(self, rank: int) -> list[str]:
        """Phases of the collectives that a rank has entered."""
        return self._ends[rank].calls

    def enter(self, rank: int, call: Call) -> list[Tensor]:
        """Waits, on a rank's thread, until the collective has been carried out; returns the gathered rows."""
        end = self._ends[rank]
        end.calls.append(call.what)
        end.sent.append(call.tensor.numel() * call.tensor.element_size())
        if not self._cut:
            self._calls[rank] = call
            self._back.release()
            self._go[rank].acquire()
        if self._cut:
            raise dist.DistNetworkError("Connection closed by peer")
        return [] if self._rows is None or call.kind != "all_gather" else list(self._rows.unbind())


class MemoryMarks(Heartbeat):
    """Marks in memory, which all ranks of a `Bus` share; the shipped `explain` names the missing."""

    def __init__(self, bus: Bus, rank: int) -> None:
        self.bus, self.rank, self.world_size = bus, rank, bus.size
        self.step = self.tick = 0
        self.mark("start")

    def mark(self, phase: str, error: str = "") -> None:
        """Notes that this rank enters ``phase``."""
        self.phase, self.marked_at = phase, time.monotonic()
        self.bus.put_mark(Mark(self.rank, self.step, self.tick, phase, time.time(), error))

    def read(self) -> list[Mark | None]:
        """The latest mark of every rank."""
        return list(self.bus.marks)

    def explain(self, patience_s: float | None = None) -> str:
        """As the shipped one, with the patience that a thousand threads of one interpreter need to have their turns."""
        return super().explain((patience() if patience_s is None else patience_s) * self.crowding**2)

    def _pause(self) -> None:
        """Waits until there is something to see: ranks that look again and again would keep the one interpreter from
        those that have still to come."""
        if self.bus.told.is_set():
            super()._pause()
        self.bus.told.wait(patience() * self.crowding)

    def close(self) -> None:
        """Does nothing: it holds no file."""


class RankWorld(World):
    """One rank's `World` on a `Bus`: the shipped one with another transport, and without DDP (nothing is trained)."""

    def __init__(self, bus: Bus, rank: int) -> None:
        self.bus, self.rank, self.size, self.local_rank = bus, rank, bus.size, rank
        self.device = torch.device("cpu")
        self.heartbeat = MemoryMarks(bus, rank)
        self.control = self.data = self._store = None
        self.find_unused = self._slow = False
        self.number = 0

    @property
    def calls(self) -> list[str]:
        """Phases of the collectives that this rank has entered, in order."""
        return self.bus.calls(self.rank)

    def _reduce(self, vector: Tensor, op: Any, *, on: str, what: str) -> None:
        name = {dist.ReduceOp.SUM: "SUM", dist.ReduceOp.MAX: "MAX", dist.ReduceOp.MIN: "MIN"}[op]
        self.bus.enter(self.rank, Call(f"all_reduce {name}", what, on, vector))

    def _gather(self, vector: Tensor, *, what: str) -> list[Tensor]:
        return self.bus.enter(self.rank, Call("all_gather", what, "control", vector))

    def allow_slow(self, slow: bool) -> None:
        """Does nothing: a collective here has no limit."""

    @property
    def limit_s(self) -> float:
        """Seconds for which a save may keep a rank waiting: it is always written by then."""
        return 600.0

    def close(self) -> None:
        """Does nothing: there is no process group."""
