"""Reads event files: torn lines of killed attempts are skipped, and steps that were repeated count once."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from esper.leyline.errors import RunDirError
from esper.nissa.envelope import FIELDS

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

    def __iter__(self) -> Iterator[tuple[Record, bytes]]:
        """Yields each record, and the line that it came from, in the order in which they were written.

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
                yield record, line


def read_events(path: str | os.PathLike[str]) -> list[Record]:
    """Returns all records of an event file, in the order in which they were written.

    A line torn by a kill is skipped: it is the last line of the file, or the next record is of a newer attempt.

    Raises:
        RunDirError: the file is missing, or there is an unreadable line where no attempt ended.
    """
    return [record for record, _ in EventFile(path)]


# Kinds of records that are always kept, even if the steps around them were repeated.
ALWAYS = ("fault", "panic", "rollback", "breaker")


def _key(record: Record) -> tuple[Any, ...]:
    payload = record["payload"]
    slot = payload.get("slot") or (payload.get("command") or {}).get("slot")
    return record["rank"], record["step"], record["tick"], record["kind"], slot


def keep_latest(records: list[Record]) -> list[Record]:
    """Returns the records of the run without those that were replaced: of repeated steps only the last pass is kept.

    A part of the run begins with an attempt, at the step of its ``run_started`` (without one, at its first record), or
    with a ``rollback``, at the step that the run went back to. It replaces all older records of later steps. An older
    record of that very step stays, unless a newer attempt has one of the same rank, step, tick, kind and slot, since
    the tick of the checkpoint is not trained again. An attempt that did not resume from a checkpoint replaces
    everything before it; one that ended before it began (a refused start) replaces nothing. Faults, panics, rollbacks
    and turns of the breaker always stay.
    """
    parts: list[tuple[int, int]] = []  # for each record: its attempt, and the number of rollbacks in it so far
    rollbacks: dict[int, int] = {}
    begins: dict[tuple[int, int], int] = {}
    fresh: set[tuple[int, int]] = set()
    keys: dict[tuple[int, int], set[tuple[Any, ...]]] = {}
    for record in records:
        attempt = record["attempt"]
        part = (attempt, rollbacks.get(attempt, 0))
        parts.append(part)
        keys.setdefault(part, set()).add(_key(record))
        if record["kind"] == "run_started":
            begins[part] = record["step"]
            if record["payload"]["resumed_from"] is None:
                fresh.add(part)
        elif record["kind"] == "rollback":
            rollbacks[attempt] = part[1] + 1
            begins[attempt, part[1] + 1] = record["payload"]["to_step"]
    for record, part in zip(records, parts, strict=True):
        if record["kind"] not in (*ALWAYS, "run_ended"):  # a start that was refused has repeated nothing
            begins.setdefault(part, record["step"])

    def is_current(record: Record, record_part: tuple[int, int]) -> bool:
        if record["kind"] in ALWAYS:
            return True
        for part, begin in begins.items():
            if part <= record_part or record["step"] < begin:
                continue
            if record["step"] > begin or part in fresh:
                return False
            if part[0] > record_part[0] and _key(record) in keys.get(part, ()):
                return False
        return True

    return [record for record, part in zip(records, parts, strict=True) if is_current(record, part)]
