"""Health of a run or a session: each rank writes what it measured of itself to a file, and rank 0 judges all of them.

    rank r   TickDone -> a thread: FOLDER/rank-0000r, overwritten in place
    rank 0   TickDone -> `HealthJudge` with the newest files of all ranks -> events `health` and `settled`

No collective carries these figures and nothing is decided by them: clocks and memory differ from rank to rank. Files
are written and read in a thread, so that a file system that hangs delays no step.
"""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from esper.karn.health import HealthJudge, Work
from esper.leyline.events import Event, TickDone
from esper.leyline.machine.room import used_share
from esper.nissa.config import HealthConfig
from esper.nissa.lane import Lane

READ_S = 2.0  # between two looks of rank 0 at the files of all ranks
SIZE = 256


def device_share(device: torch.device) -> float | None:
    """Share of a device's memory that is in use; None for the CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return 1.0 - free / total


class HealthSink:
    """Writes what this rank measured, and on rank 0 says what is odd.

    Args:
        config: limits.
        folder: where the ranks meet, as RUN/health; None if they do not: then rank 0 judges itself alone.
        rank: this rank.
        size: number of ranks.
        device: of this rank.
        tell: takes what rank 0 has to say; None on other ranks.
    """

    def __init__(
        self,
        config: HealthConfig,
        folder: Path | None,
        rank: int,
        size: int,
        device: torch.device,
        tell: Callable[[Event], None] | None = None,
    ) -> None:
        self._folder, self._rank, self._size, self._device, self._tell = folder, rank, size, device, tell
        self._judge = HealthJudge(config)
        self._works: dict[int, Work] = {}
        self._read_at = -READ_S
        self._file: int | None = None
        self._lane: Lane[TickDone] = Lane("esper-health", self._write, capacity=4, linger_s=0.0)

    def emit(self, event: Event) -> None:
        """Takes one event; returns at once."""
        if isinstance(event, TickDone):
            self._lane.put(event)  # where the disk hangs, later ticks find no place, and nothing is lost but times
        if self._tell is not None:
            for told in self._judge.take(event, self._works):
                self._tell(told)

    def flush(self) -> None:
        """Nothing has to be there."""

    def close(self) -> None:
        """Ends the thread; safe to call twice."""
        if self._lane.close(1.0) and self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, batch: list[TickDone], urgent: bool) -> None:
        event, folder = batch[-1], self._folder
        host, device = used_share(), device_share(self._device)
        if folder is None:
            own_work = Work(tick=event.tick, own_ms=event.own_ms, host_share=host, device_share=device)
            self._works = {self._rank: own_work}
            return
        own = [event.tick, event.own_ms, host, device]
        try:
            if self._file is None:
                folder.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self._path(folder, self._rank), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            os.pwrite(self._file, json.dumps(own).encode().ljust(SIZE), 0)
            if self._tell is not None and time.monotonic() - self._read_at >= READ_S:
                self._read_at = time.monotonic()
                self._works = self._read(folder)
        except OSError:  # a view of the run; its own files say so if the disk is broken
            pass

    @staticmethod
    def _path(folder: Path, rank: int) -> Path:
        return folder / f"rank-{rank:05d}"

    def _read(self, folder: Path) -> dict[int, Work]:
        found = {}
        for rank in range(self._size):
            try:
                tick, own_ms, host, device = json.loads(self._path(folder, rank).read_bytes())
                found[rank] = Work(tick=tick, own_ms=own_ms, host_share=host, device_share=device)
            except (OSError, ValueError, TypeError):  # not there yet, or being written
                continue
        return found
