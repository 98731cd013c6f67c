"""Reads a run for `esper watch` whenever its files have changed; holds no lock and writes nothing."""

import time
from collections.abc import Callable
from pathlib import Path

from esper.karn.report.gather import RunReport, gather
from esper.karn.store.finding import FoundRun
from esper.leyline.errors import RunDirError, one_line

LEAST_S = 1.0  # between two readings
PATIENCE = 10.0  # times that a reading took, between its end and the next one


class Watched:
    """One run that is watched.

    Args:
        path: RUN.
        name: how the page calls it.
        clock: seconds.

    Attributes:
        report: the newest; None before the first event.
        problem: why there is none, or why it is not newer, in one line; empty if all is well.
    """

    def __init__(self, path: Path, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self.name, self._clock = path, name, clock
        self.report: RunReport | None = None
        self.problem = ""
        self._seen: tuple[tuple[int, int], ...] | None = None
        self._next = 0.0

    def _marks(self) -> tuple[tuple[int, int], ...]:
        run = FoundRun(name=self.name, path=self.path)
        paths = [*run.event_files(), run.directory.status, run.directory.result]
        return tuple((path.stat().st_size, path.stat().st_mtime_ns) for path in paths if path.exists())

    def refresh(self, *, now: bool = False) -> bool:
        """Reads the run again if its files have changed and the last reading is long enough ago.

        Args:
            now: read in any case.

        Returns:
            Whether it was read.
        """
        if not now and self._clock() < self._next:
            return False
        try:
            marks = self._marks()
        except OSError as error:
            self.problem = f"{self.path}: {error.strerror}"
            return False
        alive = self.report is not None and self.report.facts.state == "running"
        if not now and marks == self._seen and not alive:
            return False
        began = self._clock()
        try:
            self.report, self.problem = gather(self.path, self.name), ""
        except (RunDirError, OSError) as error:
            self.problem = one_line(error)
        self._seen = marks
        self._next = self._clock() + max(LEAST_S, PATIENCE * (self._clock() - began))
        return True
