"""Saves from a running engine: a copy at the tick, a thread that writes it, and a commit that settles it.

    tick t      every rank copies its share into lasting CPU buffers; a thread writes and fsyncs them
    tick t+n    the commit in which every rank says WRITTEN (or FAILED): on rank 0 a thread hashes, writes the manifest
                and renames; a save that failed on any rank is removed
    later       rank 0 reports the result

No collective is added, and training waits for the copy alone. One save is in flight at a time. When the next one is
due, a rank waits for it, at most half as long as a collective may take. If it is still being written then, all ranks
learn that from the same commit; the save that was due is left out and reported. The last save of a run is synchronous.

A thread lives as long as its job, so a run that ends well leaves none behind. A killed run leaves a folder with a
temporary name, which nobody reads and the next attempt removes.
"""

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from esper.leyline.errors import CheckpointError, LeaseError
from esper.leyline.events import CheckpointSaved, Event, Fault
from esper.tolaria.checkpoint.hostcopy import HostCopy
from esper.tolaria.checkpoint.store import CheckpointStore, rank_file
from esper.tolaria.lockstep.wire import RankWord, SaveWord
from esper.tolaria.ranks.world import World


class _Job(threading.Thread):
    """Runs ``work`` once the job before it is over. Its errors are kept as text, never lost."""

    def __init__(self, work: Callable[[], None], after: "_Job | None") -> None:
        # A daemon, so that a disk that hangs cannot keep a failed process alive; `Saver.close` waits for it.
        super().__init__(name="esper-saver", daemon=True)
        self._work, self._after = work, after
        self.error, self.ms = "", 0.0
        self.lease: LeaseError | None = None  # the lease is lost: nothing may be saved any more
        self.start()

    def run(self) -> None:
        if self._after is not None:
            self._after.join()
            self._after = None
        began = time.perf_counter()
        try:
            self._work()
        except LeaseError as error:
            self.lease = error
        except Exception as error:  # torch.save reports a full disk as RuntimeError
            self.error = f"{type(error).__name__}: {(str(error) or 'no word').splitlines()[0]}"
        self.ms = 1e3 * (time.perf_counter() - began)


@dataclass(slots=True)
class _Flight:
    step: int
    tick: int
    score: float | None
    stall_ms: float
    job: _Job


@dataclass(slots=True)
class _Landing:
    """A save that every rank has written, being committed by rank 0."""

    flight: _Flight
    job: _Job
    size: list[int] = field(default_factory=list)


class Saver:
    """Writes this rank's share of a save, and settles the save once all ranks have given their word.

    Args:
        store: the checkpoints on disk.
        world: the ranks, for the last, synchronous save; it also says how long a collective may take.
    """

    def __init__(self, store: CheckpointStore, world: World) -> None:
        self.store, self.world = store, world
        self._buffers = HostCopy()
        self._flight: _Flight | None = None
        self._landing: _Landing | None = None
        self._waited_ms = 0.0

    @property
    def word(self) -> SaveWord:
        """This rank's word on the save in flight."""
        if self._flight is None:
            return SaveWord.NONE
        if self._flight.job.is_alive():
            return SaveWord.WRITING
        return SaveWord.FAILED if self._flight.job.error else SaveWord.WRITTEN

    @property
    def in_flight(self) -> int | None:
        """Step of the save that is not settled yet, or None; the same on every rank after a `settle`."""
        return None if self._flight is None else self._flight.step

    def wait(self, seconds: float | None = None) -> None:
        """Waits for this rank's share of the save in flight; called before a commit after which another is due.

        Args:
            seconds: longest wait; None for half of what a collective may take now.
        """
        if self._flight is not None:
            began = time.perf_counter()
            self._flight.job.join(self.world.limit_s / 2 if seconds is None else seconds)
            self._waited_ms = 1e3 * (time.perf_counter() - began)

    def begin(
        self, step: int, tick: int, score: float | None, common: dict[str, Any] | None, own: dict[str, Any]
    ) -> None:
        """Copies this rank's share and lets a thread write it. No other save may be in flight.

        Args:
            step: optimizer step of the state.
            tick: tick of the state.
            score: what ranks it among checkpoints, higher is better; None if validation may not choose it.
            common: everything that is equal on all ranks; on rank 0 alone.
            own: everything that is this rank's own.
        """
        assert self._flight is None
        began = time.perf_counter()
        landing = None if self._landing is None else self._landing.job  # it does not use the buffers
        shares = {} if common is None else {"state.pt": common}
        twins = self._buffers.take({**shares, rank_file(self.world.rank): own})

        def write() -> None:
            self._buffers.ready()
            for name, payload in twins.items():
                self.store.write(step, name, payload)

        stall_ms = self._waited_ms + 1e3 * (time.perf_counter() - began)
        self._waited_ms = 0.0
        self._flight = _Flight(step, tick, score, stall_ms, _Job(write, landing))

    def settle(self, ranks: tuple[RankWord, ...], axes: dict[str, int]) -> list[Event]:
        """Called after a commit: once every rank is done, rank 0 commits the save in flight, or removes it.

        Args:
            ranks: each rank's word in this commit.
            axes: axes of the events.

        Returns:
            Events: on rank 0 the results of saves, on another rank its own failure.

        Raises:
            LeaseError: on rank 0, a newer attempt has begun.
        """
        events = self._take_landing(axes)
        words = [word.save for word in ranks]
        if self._flight is None or SaveWord.WRITING in words:
            return events
        flight, self._flight = self._flight, None
        where = str(self.store.path(flight.step))
        failed = [rank for rank, word in enumerate(words) if word is not SaveWord.WRITTEN]
        if self.world.rank != 0:
            if flight.job.error:
                what = f"save of step {flight.step} failed here: {flight.job.error}"
                events.append(Fault(**axes, what=what, where=where))
        elif failed:
            events.append(self._abandon(flight, failed, flight.job.error, axes))
        else:
            size: list[int] = []

            def commit() -> None:
                size.append(
                    self.store.commit(flight.step, tick=flight.tick, world_size=self.world.size, score=flight.score)
                )

            assert self._landing is None  # this flight's writing began after it
            self._landing = _Landing(flight, _Job(commit, None), size)
        return events

    def _take_landing(self, axes: dict[str, int], *, join: bool = False) -> list[Event]:
        """The result of the save that rank 0 was committing; empty while it is not done."""
        landing = self._landing
        if landing is not None and join:
            landing.job.join()
        if landing is None or landing.job.is_alive():
            return []
        self._landing = None
        flight = landing.flight
        if landing.job.lease is not None:
            raise landing.job.lease
        if landing.job.error:
            return [self._abandon(flight, [0], landing.job.error, axes)]
        ms = flight.job.ms + landing.job.ms
        where = str(self.store.path(flight.step))
        return [
            CheckpointSaved(
                **axes,
                saved_step=flight.step,
                path=where,
                bytes=landing.size[0],
                save_ms=ms,
                stall_ms=flight.stall_ms,
            )
        ]

    def _abandon(self, flight: _Flight, failed: list[int], error: str, axes: dict[str, int]) -> Fault:
        with contextlib.suppress(OSError):  # where RUN cannot be read, nothing there can be removed either
            self.store.lease()  # a newer attempt removes what this one was writing
        self.store.abandon(flight.step)
        text = f"save of step {flight.step} failed on rank {', '.join(map(str, failed))}"
        what = f"{text}: {error or 'see that rank'}; older checkpoints are untouched"
        return Fault(**axes, what=what, where=str(self.store.path(flight.step)))

    def drain(self, axes: dict[str, int], seconds: float) -> list[Event]:
        """Settles the save in flight now, on all ranks together.

        Args:
            axes: axes of the events.
            seconds: longest wait for the writing.

        Raises:
            CheckpointError: it is still being written on some rank; every rank raises the same text.
        """
        self.wait(seconds)
        words = torch.zeros(self.world.size, dtype=torch.int64)
        words[self.world.rank] = int(self.word)
        self.world.all_reduce(words, dist.ReduceOp.MAX, what="save", on="default")
        ranks = tuple(RankWord(save=SaveWord(value)) for value in words.tolist())
        step = self.in_flight
        events = self.settle(ranks, axes)
        if self._flight is not None:
            slow = ", ".join(str(rank) for rank, word in enumerate(ranks) if word.save is SaveWord.WRITING)
            raise CheckpointError(
                f"save of step {step} is still being written on rank {slow} after {seconds:.0f} s more; "
                f"is its disk reachable? {self._newest()}"
            )
        return events + self._take_landing(axes, join=True)

    def finish(self, axes: dict[str, int], seconds: float) -> list[Event]:
        """Settles the save in flight synchronously: the last save of a run.

        Args:
            axes: axes of the events.
            seconds: longest wait for the writing.

        Raises:
            CheckpointError: it failed; the text names the newest checkpoint.
        """
        step = self.in_flight
        if step is None:
            return self._take_landing(axes, join=True)
        events = self.drain(axes, seconds)
        saved = any(isinstance(event, CheckpointSaved) and event.saved_step == step for event in events)
        committed = torch.tensor([int(saved)], dtype=torch.int64)
        self.world.all_reduce(committed, dist.ReduceOp.MAX, what="save-commit", on="default")
        if not committed.item():
            faults = [event.what for event in events if isinstance(event, Fault)]
            raise CheckpointError(f"{faults[-1] if faults else f'save of step {step} failed'}; {self._newest()}")
        return events

    def close(self, seconds: float = 10.0) -> None:
        """Waits at most ``seconds`` for what is being written; for a run that ends with an error."""
        until = time.monotonic() + seconds
        for pending in (self._landing, self._flight):
            if pending is not None:
                pending.job.join(max(0.0, until - time.monotonic()))

    def _newest(self) -> str:
        newest = next(iter(self.store.steps()), None)
        return "there is no older checkpoint" if newest is None else f"the newest checkpoint is step {newest}"
