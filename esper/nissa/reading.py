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


def _key(record: Record) -> tuple[Any, ...]:
    payload = record["payload"]
    slot = payload.get("slot") or (payload.get("command") or {}).get("slot")
    return record["rank"], record["step"], record["tick"], record["kind"], slot


def latest(records: list[Record]) -> list[Record]:
    """The records of the run as it stands: what a newer attempt did again is taken from it.

    An attempt begins at the step of its ``run_started`` (without one, at its first record). Beyond that step older
    attempts count no more. At that very step an older record stays unless the newer attempt wrote one of the same
    rank, step, tick, kind and slot: the tick that the checkpoint was taken at is not trained again. An attempt that
    resumed from nothing replaces all before it. Faults happened when they happened and always stay.
    """
    begins: dict[int, int] = {}
    fresh: set[int] = set()
    keys: dict[int, set[tuple[Any, ...]]] = {}
    for record in records:
        attempt = record["attempt"]
        keys.setdefault(attempt, set()).add(_key(record))
        if record["kind"] == "run_started":
            begins[attempt] = record["step"]
            if record["payload"]["resumed_from"] is None:
                fresh.add(attempt)
    for record in records:
        begins.setdefault(record["attempt"], record["step"])

    def stands(record: Record) -> bool:
        if record["kind"] == "fault":
            return True
        for attempt, begin in begins.items():
            if attempt <= record["attempt"] or record["step"] < begin:
                continue
            if record["step"] > begin or attempt in fresh or _key(record) in keys[attempt]:
                return False
        return True

    return [record for record in records if stands(record)]
