"""Reading event files back: torn lines of killed attempts are passed over, replays after a kill count once."""

import json
import os
from pathlib import Path
from typing import Any

from esper.leyline.errors import RunDirError
from esper.nissa.envelope import FIELDS

Record = dict[str, Any]


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:  # also bytes that are no UTF-8
        return None
    return record if isinstance(record, dict) and set(FIELDS) <= set(record) else None


def read_events(path: str | os.PathLike[str]) -> list[Record]:
    """All records of an event file, in the order in which they were written.

    A line that a kill tore is passed over: it is the file's last, or the next record is of a newer attempt.

    Raises:
        RunDirError: the file is missing, or an unreadable line stands where no attempt ended.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        raise RunDirError(f"{path}: no such event file; is this a run directory?") from None
    records: list[Record] = []
    torn: int | None = None
    attempt = 0
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        record = _parse(line)
        if record is None:
            torn = torn or number
            continue
        if torn is not None and record["attempt"] <= attempt:
            raise RunDirError(
                f"{path}:{torn}: not an event record, in the midst of attempt {attempt}; the file was damaged after "
                "it was written: restore it, or remove that line"
            )
        torn, attempt = None, record["attempt"]
        records.append(record)
    return records


# What happened when it happened, whatever became of the steps around it.
ALWAYS = ("fault", "panic", "rollback", "breaker")


def _key(record: Record) -> tuple[Any, ...]:
    payload = record["payload"]
    slot = payload.get("slot") or (payload.get("command") or {}).get("slot")
    return record["rank"], record["step"], record["tick"], record["kind"], slot


def latest(records: list[Record]) -> list[Record]:
    """The records of the run as it stands: what was done again is taken from where it was done last.

    An attempt begins at the step of its ``run_started`` (without one, at its first record), and so does what follows a
    ``rollback``, at the step that it went back to. Beyond that step older records count no more. At that very step an
    older record stays unless a newer attempt has one of the same rank, step, tick, kind and slot: the tick that the
    checkpoint was taken at is not trained again. An attempt that resumed from nothing replaces all before it. Faults,
    panics, rollbacks and the breaker's turns happened when they happened and always stay.
    """
    parts: list[tuple[int, int]] = []  # of each record: attempt, and rollbacks in it so far
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
        begins.setdefault(part, record["step"])

    def stands(record: Record, own: tuple[int, int]) -> bool:
        if record["kind"] in ALWAYS:
            return True
        for part, begin in begins.items():
            if part <= own or record["step"] < begin:
                continue
            if record["step"] > begin or part in fresh:
                return False
            if part[0] > own[0] and _key(record) in keys.get(part, ()):
                return False
        return True

    return [record for record, part in zip(records, parts, strict=True) if stands(record, part)]
