"""Reads event files: torn lines of killed attempts are skipped, and steps that were repeated count once."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esper.leyline.errors import RunDirError
from esper.nissa.envelope import FIELDS, whole

Record = dict[str, Any]


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # also raised for bytes that are not UTF-8
        return None
    return record if isinstance(record, dict) and set(FIELDS) <= set(record) else None


class EventFile:
    """An event file, read record by record, so that a long one need not fit into memory.

    Args:
        path: the file.

    Attributes:
        torn: lines passed over until now, each torn by a kill (or being written at this moment).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, self.torn = Path(path), 0

    def __iter__(self) -> Iterator[Record]:
        """Yields each record, whole, in the order in which they were written; see `as_written`."""
        return map(whole, self.as_written())

    def as_written(self) -> Iterator[Record]:
        """Yields each record in the order in which they were written, its payload as short as it is in the file.

        A line torn by a kill is skipped: it is the last line of the file, or the next record is of a newer attempt.

        Raises:
            RunDirError: the file is missing, or there is an unreadable line where no attempt ended.
        """
        torn: int | None = None
        attempt = self.torn = 0
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            raise RunDirError(f"{self.path}: no such event file; is this a run directory?") from None
        with file:
            for number, raw in enumerate(file, start=1):
                line = raw.rstrip(b"\n")
                if not line:
                    continue
                record = _parse(line)
                if record is None:
                    torn, self.torn = torn or number, self.torn + 1
                    continue
                if torn is not None and record["attempt"] <= attempt:
                    raise RunDirError(
                        f"{self.path}:{torn}: not an event record, in the midst of attempt {attempt}; the file was "
                        "damaged after it was written: restore it, or remove that line"
                    )
                torn, attempt = None, record["attempt"]
                yield record


def read_events(path: str | os.PathLike[str]) -> list[Record]:
    """Returns all records of an event file, in the order in which they were written.

    A line torn by a kill is skipped: it is the last line of the file, or the next record is of a newer attempt.

    Raises:
        RunDirError: the file is missing, or there is an unreadable line where no attempt ended.
    """
    return list(EventFile(path))


# Kinds of records that are always kept, even if the steps around them were repeated.
ALWAYS = ("fault", "panic", "rollback", "breaker")


def _key(record: Record) -> tuple[Any, ...]:
    payload = record["payload"]
    slot = payload.get("slot") or (payload.get("command") or {}).get("slot")
    return record["rank"], record["step"], record["tick"], record["kind"], slot or None


Part = tuple[int, int]  # an attempt, and the number of rollbacks in it so far


class Replays:
    """Which records of a run were replaced: of repeated steps only the last pass counts.

    A part of the run begins with an attempt, at the step of its ``run_started`` (without one, at its first record), or
    with a ``rollback``, at the step that the run went back to. It replaces all older records of later steps. An older
    record of that very step stays, unless a newer attempt has one of the same rank, step, tick, kind and slot, since
    the tick of the checkpoint is not trained again. An attempt that did not resume from a checkpoint replaces
    everything before it; one that ended before it began (a refused start) replaces nothing. Faults, panics, rollbacks
    and turns of the breaker always stay.

    Call `note` for each record in order, then, for each pass over them, `begin_pass`, and `finds_current` for each
    record in the same order. What is held in memory grows with attempts and rollbacks, not with records.
    """

    def __init__(self) -> None:
        self._begins: dict[Part, int] = {}
        self._first: dict[Part, int] = {}  # step of the first record, for a part without a start
        self._fresh: set[Part] = set()
        self._keys: dict[Part, set[tuple[Any, ...]]] = {}  # of records at the step where their part begins
        self._noted, self._asked = _Parts(), _Parts()

    def note(self, record: Record) -> None:
        """Takes a record of the first pass."""
        part = self._noted.of(record)
        if record["kind"] == "run_started":
            self._begin(part, record["step"])
            if record["payload"]["resumed_from"] is None:
                self._fresh.add(part)
        if record["kind"] not in (*ALWAYS, "run_ended"):  # a start that was refused has repeated nothing
            self._first.setdefault(part, record["step"])
        if part not in self._begins or self._begins[part] == record["step"]:
            self._keys.setdefault(part, set()).add(_key(record))
        if record["kind"] == "rollback":
            self._begin(self._noted.newest, record["payload"]["to_step"])

    def _begin(self, part: Part, step: int) -> None:
        self._begins[part] = step
        self._keys[part] = {key for key in self._keys.get(part, ()) if key[1] == step}

    def begin_pass(self) -> None:
        """A pass over the records begins."""
        self._asked = _Parts()

    def finds_current(self, record: Record) -> bool:
        """Whether the next record of this pass still counts."""
        its_part = self._asked.of(record)
        if record["kind"] in ALWAYS:
            return True
        for part, begin in {**self._first, **self._begins}.items():
            if part <= its_part or record["step"] < begin:
                continue
            if record["step"] > begin or part in self._fresh:
                return False
            if part[0] > its_part[0] and _key(record) in self._keys.get(part, ()):
                return False
        return True


class _Parts:
    """Tells the part that each record of a file is in, in order."""

    def __init__(self) -> None:
        self._rollbacks: dict[int, int] = {}
        self.newest: Part = (0, 0)

    def of(self, record: Record) -> Part:
        """The part of the next record; a rollback is the last one of its part."""
        attempt = record["attempt"]
        number = self._rollbacks.get(attempt, 0)
        if record["kind"] == "rollback":
            self._rollbacks[attempt] = number + 1
        self.newest = attempt, self._rollbacks.get(attempt, 0)
        return attempt, number


def keep_latest(records: list[Record]) -> list[Record]:
    """Returns the records of the run without those that were replaced; see `Replays`."""
    replays = Replays()
    for record in records:
        replays.note(record)
    return [record for record in records if replays.finds_current(record)]


class LatestRecords:
    """The records of an event file without those that were replaced, read one by one, as often as is asked.

    Args:
        path: the file; it is read once here, and once by each pass over the records.

    Raises:
        RunDirError: see `EventFile`.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file, self._replays = EventFile(path), Replays()
        for record in self._file.as_written():  # the short form has all that is looked at, but of these two kinds
            self._replays.note(whole(record) if record["kind"] in ("run_started", "rollback") else record)

    @property
    def torn(self) -> int:
        """Lines passed over by the newest pass."""
        return self._file.torn

    def judged(self) -> Iterator[tuple[Record, bool]]:
        """Yields every record, and whether it still counts."""
        self._replays.begin_pass()
        for record in self._file:
            yield record, self._replays.finds_current(record)

    def __iter__(self) -> Iterator[Record]:
        """Yields each record that still counts, in order."""
        return (record for record, current in self.judged() if current)


def read_latest(path: str | os.PathLike[str]) -> Iterator[Record]:
    """Yields the records of an event file without those that were replaced, one by one; reads the file twice.

    Raises:
        RunDirError: see `EventFile`.
    """
    yield from LatestRecords(path)
