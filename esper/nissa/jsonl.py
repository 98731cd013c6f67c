"""The run's event file: one JSON object per line, appended by one process in a writer thread of its own.

The file is created with the first record, so a rank without events leaves no file. A write error (full disk, read-only
file system) never reaches training: it is reported once, records are counted as lost, and critical ones are kept and
written again with each later write. If that takes long, they are on another disk meanwhile (`esper.nissa.spill`).
`esper.nissa.reading` reads the file.
"""

import json
import math
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from esper.leyline.events import Event, Fault
from esper.nissa.config import Level
from esper.nissa.envelope import Envelope
from esper.nissa.lane import Lane, say
from esper.nissa.spill import Spill


class _Line(NamedTuple):
    data: bytes
    kind: str
    critical: bool


def _finite(value: Any) -> Any:
    """Replaces non-finite floats by the strings 'nan', 'inf' and '-inf', since JSON has no numbers for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


def encode(record: dict[str, Any]) -> bytes:
    """Returns one line of strict JSON in ASCII, with its newline."""
    try:
        text = json.dumps(record, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(record), allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


class JsonlSink:
    """Writes events to one file.

    Priority events go to the writer thread at once, are written in order and synced to disk; others are written in
    batches, at most ``linger_s`` later. Critical ones are never dropped.

    The file never keeps half a record: one that was written in part is cut off again, and a torn last line of a killed
    attempt is ended before the first record.

    Args:
        path: the file; its folder is created with it. Only one process at a time may write a file.
        envelope: numbers the events of this process.
        level: the ordinary events that are written; with ``Level.OFF`` only priority events are (ranks above 0).
        capacity: ordinary records that may wait; further ones are dropped and counted.
        linger_s: seconds that an ordinary record may wait for others.
        timeout_s: seconds that ``flush`` and ``close`` wait for a hanging file system.
        spill: takes critical records that the file does not take; None for no such place.

    Attributes:
        dropped: records refused by a full queue, by kind.
        lost: records that could not be written or encoded.
        error: the first error, or None.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        envelope: Envelope,
        level: Level,
        *,
        capacity: int = 8192,
        linger_s: float = 0.2,
        timeout_s: float = 10.0,
        spill: Spill | None = None,
    ) -> None:
        self.path, self.level, self.spill = Path(path), level, spill
        self.dropped: Counter[str] = Counter()
        self.lost = 0
        self.error: Exception | None = None
        self._envelope, self._timeout_s = envelope, timeout_s
        self._fd: int | None = None
        self._torn = False
        self._owed: list[_Line] = []
        self._axes = (0, 0, 0)  # step, tick, epoch of the newest event
        self._closed = False
        self._order = threading.Lock()
        self._lane: Lane[_Line] = Lane(f"esper-{self.path.name}", self._write, capacity=capacity, linger_s=linger_s)

    def emit(self, event: Event) -> None:
        """Takes one event; returns at once."""
        if not self.level.takes(event):
            return
        with self._order:  # numbers and lines in one order, whichever thread emits
            self._axes = (event.step, event.tick, event.epoch)
            try:
                line = _Line(encode(self._envelope.to_record(event)), event.kind, event.critical)
            except (TypeError, ValueError) as error:  # a summary that holds something that is not plain data
                self.lost += 1
                self._note(error)
                return
            if line.critical and self.spill is not None:
                self.spill.expect(line.data)
            if not self._lane.put(line, priority=event.priority, keep=line.critical):
                self.dropped[line.kind] += 1

    def flush(self) -> None:
        """Returns when all events taken so far have been written, or the file system hung for ``timeout_s``."""
        if not self._lane.flush(self._timeout_s):
            self._note(TimeoutError(f"no answer from the file system in {self._timeout_s:g} s"))

    def close(self) -> None:
        """Writes the queued records and, if any were lost, a last record with the counts; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self.flush()
        if self.dropped or self.lost or self._owed:
            step, tick, epoch = self._axes
            kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.dropped.items()))
            dropped = f"{self.dropped.total()} events dropped by a full queue{kinds and f' ({kinds})'}"
            what = f"{dropped}, {self.lost} lost ({self.error or 'no error'})"
            self.emit(Fault(step=step, tick=tick, epoch=epoch, what=what, where=f"telemetry {self.path.name}"))
        closed = self._lane.close(self._timeout_s)
        spilled = self.spill.spill_all() if self.spill is not None else 0
        if spilled:
            say(f"telemetry: {spilled} critical events are in {self.spill and self.spill.path}, not in {self.path}")
        elif self._owed:
            say(f"telemetry: {len(self._owed)} critical events could not be written to {self.path}")
        if not closed:
            return  # the thread still hangs in a write, so the descriptor is not ours to close
        if self._fd is not None:
            try:
                os.fsync(self._fd)
            except OSError as error:
                self._note(error)
            os.close(self._fd)
            self._fd = None

    def _note(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
            say(f"telemetry: cannot write {self.path}: {error}; training goes on, missing events are counted")

    def _write(self, batch: list[_Line], urgent: bool) -> None:
        home: list[Path] = []
        if self._fd is None and self.spill is not None and not self._owed:
            found, home = self.spill.left_behind(self.path)
            self._owed = [_Line(data, "", True) for data in found]
        lines = [*self._owed, *batch]
        try:
            fd = self._open()
            self._append(fd, b"".join(line.data for line in lines))
            if urgent or self._owed:
                os.fsync(fd)
            self._owed = []
        except OSError as error:
            self._owed = [line for line in lines if line.critical]
            self.lost += len(lines) - len(self._owed)
            self._note(error)
            return
        for path in home:
            path.unlink(missing_ok=True)
        if self.spill is not None and any(line.critical for line in lines):
            self.spill.written([line.data for line in lines if line.critical])

    def _append(self, fd: int, data: bytes) -> None:
        end = os.fstat(fd).st_size
        rest = memoryview(b"\n" + data if self._torn else data)
        try:
            while rest:
                rest = rest[os.write(fd, rest) :]
        except OSError:
            if os.fstat(fd).st_size > end:
                before, self._torn = self._torn, True
                os.ftruncate(fd, end)
                self._torn = before
            raise
        self._torn = False

    def _open(self) -> int:
        if self._fd is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            size = os.fstat(fd).st_size
            self._torn = size > 0 and os.pread(fd, 1, size - 1) != b"\n"
            self._fd = fd
        return self._fd
