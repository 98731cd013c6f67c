"""Critical lines on another disk, for as long as their own file cannot take them.

    expect(line) --[ not written after ``after_s`` ]--> spill file        written(line): forgotten again

A file system that hangs holds the writer of the event file for minutes, and a rank may be killed meanwhile. So a thread
of its own writes what is overdue into a file of this rank below the system's folder for temporary files (or
``telemetry.spill``), and takes it away once the event file has everything. What a killed attempt has left there is
brought home by the next one of the same run, rank and machine.
"""

import contextlib
import mmap
import os
import threading
import time
from pathlib import Path

from esper.nissa.lane import say

AGAIN_S = 1.0  # at least, between two tries to write a spill file that could not be written


class Spill:
    """The spill file of one rank.

    Args:
        folder: folder on another file system than the event file, if there is one.
        run_id: the run's id.
        attempt: number of this start of the run.
        rank: of this process.
        after_s: seconds that a line may wait for its own file.
    """

    def __init__(self, folder: Path, run_id: str, attempt: int, rank: int, *, after_s: float = 2.0) -> None:
        self._pattern = f"esper-{run_id}-*-rank-{rank:05d}.spill"
        self.folder = folder
        self.path = folder / self._pattern.replace("*", str(attempt))
        self._after_s = after_s
        self._waiting: dict[bytes, float] = {}  # line -> when it is overdue
        self._spilled: set[bytes] = set()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._failed = False

    def expect(self, line: bytes) -> None:
        """Notes a line that was handed to the writer of the event file; returns at once."""
        with self._changed:
            self._waiting[line] = time.monotonic() + self._after_s
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="esper-spill", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def written(self, lines: list[bytes]) -> None:
        """Notes that the event file has these lines."""
        with self._changed:
            for line in lines:
                self._waiting.pop(line, None)
                self._spilled.discard(line)
            done = not self._spilled
        if done:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def spill_all(self) -> int:
        """Writes all lines that still wait, at the end of the process; returns how many lines the file holds."""
        with self._changed:
            self._spill(list(self._waiting))
            return len(self._spilled)

    def _run(self) -> None:
        with self._changed:
            while True:
                ahead = [line for line in self._waiting if line not in self._spilled]
                if not ahead:
                    self._changed.wait()
                    continue
                left = min(self._waiting[line] for line in ahead) - time.monotonic()
                if left > 0:
                    self._changed.wait(left)
                    continue
                if not self._spill([line for line in ahead if self._waiting[line] <= time.monotonic()]):
                    self._changed.wait(max(self._after_s, AGAIN_S))

    def _spill(self, lines: list[bytes]) -> bool:
        """Writes the lines that the file lacks; returns whether it has all of them now."""
        lines = [line for line in lines if line not in self._spilled]
        if not lines:
            return True
        made = False
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(self.path, flags if self._spilled else flags | os.O_EXCL, 0o600)
            made = not self._spilled
            try:
                os.write(fd, b"".join(lines))
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if made:
                with contextlib.suppress(OSError):
                    self.path.unlink()
            if not self._failed:
                say(f"telemetry: {len(lines)} critical events wait in memory, {self.path} cannot be written: {error}")
            self._failed = True
            return False
        if not self._spilled:
            say(f"telemetry: the event file takes nothing; critical events are in {self.path} until it does")
        self._spilled.update(lines)
        return True

    def left_behind(self, events: Path) -> tuple[list[bytes], list[Path]]:
        """Lines that earlier attempts have left, and that the event file lacks; and the files that they are in."""
        files, lines = [], []
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.glob(self._pattern)):
                if path != self.path and not path.is_symlink() and path.stat().st_uid == os.getuid():
                    files.append(path)
                    lines += path.read_bytes().splitlines(keepends=True)
        return [line for line in lines if line.endswith(b"\n") and not _holds(events, line)], files


def _holds(path: Path, line: bytes) -> bool:
    """Whether a file holds a line."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
            return whole.find(line) >= 0
    except (OSError, ValueError):  # not there, or empty
        return False
