"""The envelope of an event on disk: its run, attempt and rank, its number and time, and the version of the schema.

    {"schema": 1, "run_id": "...", "attempt": 1, "rank": 0, "seq": 7, "time": 1.7e9,
     "kind": "stage", "step": 300, "tick": 6, "epoch": 2, "payload": {...the event's own fields...}}

``seq`` counts the events that a process *emitted*, so a gap shows where some were dropped. The payload is in its short
form (`esper.leyline.events.short`); `whole` gives the long one, and so does every reader here.
"""

import dataclasses
import itertools
import time
from typing import Any

from esper.leyline.events import EVENTS, READABLE, SCHEMA_VERSION, Event
from esper.leyline.events.short import restore, shorten
from esper.leyline.plain import from_plain

AXES = ("step", "tick", "epoch")
SHORT_SINCE = 4  # schema of the first records in short form
FIELDS = ("schema", "run_id", "attempt", "rank", "seq", "time", "kind", *AXES, "payload")


class Envelope:
    """Numbers the events of one process.

    Args:
        run_id: id of the run, the same in every attempt.
        attempt: number of this start of the run, from 1.
        rank: rank of this process.
    """

    def __init__(self, run_id: str, attempt: int, rank: int) -> None:
        if attempt < 1 or rank < 0:
            raise ValueError(f"envelope of attempt {attempt}, rank {rank}: attempts count from 1, ranks from 0")
        self.run_id, self.attempt, self.rank = run_id, attempt, rank
        self._numbers = itertools.count()

    def to_record(self, event: Event) -> dict[str, Any]:
        """Returns an event as plain data, with the next sequence number. Safe to call from several threads."""
        payload = shorten(event)
        axes = {axis: payload.pop(axis) for axis in AXES}
        return {
            "schema": SCHEMA_VERSION,
            "run_id": self.run_id,
            "attempt": self.attempt,
            "rank": self.rank,
            "seq": next(self._numbers),
            "time": round(time.time(), 3),
            "kind": event.kind,
            **axes,
            "payload": payload,
        }


def whole(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record with all that its short form left out; one of an unknown kind as it is."""
    cls, payload = EVENTS.get(record["kind"]), record["payload"]
    is_short = record["schema"] in READABLE and record["schema"] >= SHORT_SINCE
    if cls is None or not is_short or not isinstance(payload, dict):
        return record
    return {**record, "payload": restore(cls, payload, record["tick"])}


def from_record(record: dict[str, Any]) -> Event:
    """Returns the event of a record.

    Raises:
        ValueError: a field is missing, unknown or of another type, or kind or schema are unknown; the text names it.
    """
    missing, unknown = set(FIELDS) - set(record), set(record) - set(FIELDS)
    if missing or unknown:
        raise ValueError(f"event record: missing {sorted(missing)}, unknown {sorted(unknown)}")
    if record["schema"] not in READABLE:
        known = " and ".join(map(str, READABLE))
        raise ValueError(f"event record of schema {record['schema']!r}; this version reads {known}")
    cls = EVENTS.get(record["kind"])
    if cls is None:
        raise ValueError(f"event record of kind {record['kind']!r}; kinds are {', '.join(sorted(EVENTS))}")
    payload = record["payload"]
    if not isinstance(payload, dict):
        raise ValueError(f"{cls.__name__}: payload must be a mapping, got {type(payload).__name__}")
    payload = whole(record)["payload"]
    names = {field.name for field in dataclasses.fields(cls)} - set(AXES)
    if stray := set(payload) - names:
        raise ValueError(f"{cls.__name__}: unknown {', '.join(sorted(stray))}")
    return from_plain(cls, {**{axis: record[axis] for axis in AXES}, **payload})
