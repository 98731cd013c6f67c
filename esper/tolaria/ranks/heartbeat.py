"""Heartbeats: one small file per rank in the run directory, overwritten in place, says where the rank last was.

A collective that times out says only that some rank is missing. So each rank marks the phase that it enters, and the
others read the marks to name the missing one. Files on the file system that all ranks share need no server that could
itself be the stopped rank, and reading them never blocks on a peer.

A mark is dated twice: by the wall clock, and by the clock that counts from the machine's boot, which no correction of
the time moves. Ranks on one machine use the second.
"""

import contextlib
import functools
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from esper.leyline.files import sync

SIZE = 512
LOST = "lost contact"  # beginning of the error of a rank that waits for another one
PATIENCE_S = 2.0  # longest wait for the marks of other ranks that wait in vain, too, where each has a core
MOST_LOAD = 5.0  # cores' worth of work for each core, beyond which the wait grows no more


def patience() -> float:
    """Longest wait, in seconds, for the marks of others: on a machine that has too much to do they come later."""
    return PATIENCE_S * min(MOST_LOAD, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


@dataclass(frozen=True, slots=True)
class Mark:
    """One rank's latest mark.

    Fields:
        rank: the rank.
        step: its optimizer step.
        tick: its control tick.
        phase: the phase that it entered.
        at: when it entered, in the reader's `time.time()`.
        error: its error text, or empty.
    """

    rank: int
    step: int
    tick: int
    phase: str
    at: float
    error: str

    @property
    def is_victim(self) -> bool:
        """Whether this rank, too, waited in vain."""
        return self.error.startswith(LOST)


class Heartbeat:
    """Writes this rank's mark and reads the others'."""

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path(rank), os.O_RDWR | os.O_CREAT, 0o666)
        self.step = self.tick = 0
        self.marked_at = time.monotonic()
        self.phase = ""
        self.mark("start")

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05d}"

    def mark(self, phase: str, error: str = "") -> None:
        """Notes that this rank enters ``phase`` (a few microseconds); an error is synced, since it may be the last."""
        if not error:  # an error comes from within a phase, whose beginning must stay known
            self.marked_at = time.monotonic()
        self.phase = phase
        line, now = b"", [time.time(), _boot(), time.monotonic()]
        for length in range(min(len(error), 300), -1, -1):  # escapes lengthen a text, and a cut record cannot be read
            line = json.dumps([self.step, self.tick, phase, now, error[:length]]).encode()
            if len(line) <= SIZE:
                break
        os.pwrite(self._file, line.ljust(SIZE), 0)
        if error:
            with contextlib.suppress(OSError):  # the error itself matters more than its mark
                sync(self._path(self.rank))

    def read(self) -> list[Mark | None]:
        """The latest mark of every rank; None for one that never wrote."""
        marks: list[Mark | None] = []
        for rank in range(self.world_size):
            try:
                step, tick, phase, (at, boot, since_boot), error = json.loads(self._path(rank).read_bytes())
                if boot and boot == _boot():
                    at = time.time() - (time.monotonic() - since_boot)
                marks.append(Mark(rank, step, tick, phase, at, error))
            except (OSError, ValueError):
                marks.append(None)
        return marks

    def explain(self, patience_s: float | None = None) -> str:
        """One line on who is missing, for an error text.

        A rank that stopped where this one waits has the same mark as this one. So this rank first marks that it has
        lost contact, and waits a little for the others to do the same. A rank that stays silent is missing; a rank that
        has lost contact is a victim like this one. A rank that failed by itself is the cause, whoever else is silent.

        Args:
            patience_s: longest wait for the others, in seconds; None: `patience`.
        """
        self.mark(self.phase, LOST)
        until = time.monotonic() + (patience() if patience_s is None else patience_s)
        while True:
            others = [(rank, mark) for rank, mark in enumerate(self.read()) if rank != self.rank]
            failed = [mark for _, mark in others if mark is not None and mark.phase == "failed" and not mark.is_victim]
            if failed:
                return "; ".join(f"rank {mark.rank} failed at step {mark.step}: {mark.error}" for mark in failed)
            silent = [(rank, mark) for rank, mark in others if mark is None or not mark.is_victim]
            elsewhere = [rank for rank, mark in silent if mark is None or self._is_elsewhere(mark)]
            if not silent or len(silent) == len(elsewhere) == 1 or time.monotonic() >= until:
                break
            self._pause()
        now, parts = time.time(), []
        for rank, mark in silent or [(rank, mark) for rank, mark in others if mark and self._is_elsewhere(mark)]:
            if mark is None:
                parts.append(f"rank {rank} never arrived")
            elif mark.phase == "failed":
                parts.append(f"rank {rank} {mark.error}")
            else:
                where = f"{mark.phase} at step {mark.step}, tick {mark.tick}"
                parts.append(f"rank {rank} was last seen in {where}, {now - mark.at:.1f} s ago")
        return "; ".join(parts) or "every rank says the same: the network between them may be cut"

    def _pause(self) -> None:
        """Gives the others time for their marks."""
        time.sleep(0.05 * self.crowding)

    @property
    def crowding(self) -> float:
        """How many times longer than a few ranks these pause between two looks, so that reading stays a small load: it
        grows with the square of their number."""
        return max(1.0, self.world_size / 64)

    def _is_elsewhere(self, mark: Mark) -> bool:
        """Whether a rank is behind this one, or in another phase."""
        return (mark.tick, mark.step) < (self.tick, self.step) or mark.phase != self.phase

    def close(self) -> None:
        """Releases the file; safe to call twice."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


@functools.cache
def _boot() -> str:
    """Identifies this boot of this machine; "" if the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return ""
