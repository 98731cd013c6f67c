"""The envelope of an event on disk: which run, attempt and rank, in which order, when, in which schema.

    {"schema": 1, "run_id": "...", "attempt": 1, "rank": 0, "seq": 7, "time": 1.7e9,
     "kind": "stage", "step": 300, "tick": 6, "epoch": 2, "payload": {...the event's own fields...}}

Numbers count what a process *emitted*, so a gap in ``seq`` shows where something was dropped.
"""

import dataclasses
import itertools
import time
from typing import Any

from esper.leyline.events import EVENTS, SCHEMA_VERSION, Event
from esper.leyline.plain import from_plain, to_plain

AXES = ("step", "tick", "epoch")
FIELDS = ("schema", "run_id", "attempt", "rank", "seq", "time", "kind", *AXES, "payload")


class Envelope:
    """Numbers the events of one process.

    Args:
        run_id: stable over attempts. attempt: which start of the run this is, from 1. rank: of this process.
    """

    def __init__(self, run_id: str, attempt: int, rank: int) -> None:
        if attempt < 1 or rank < 0:
            raise ValueError(f"envelope of attempt {attempt}, rank {rank}: attempts count from 1, ranks from 0")
        self.run_id, self.attempt, self.rank = run_id, attempt, rank
        self._numbers = itertools.count()

    def to_record(self, event: Event) -> dict[str, Any]:
        """Plain data of an event under the next sequence number. Safe from several threads."""
        payload = to_plain(event)
        axes = {axis: payload.pop(axis) for axis in AXES}
        return {
            "schema": SCHEMA_VERSION,
            "run_id": self.run_id,
            "attempt": self.attempt,
            "rank": self.rank,
            "seq": next(self._numbers),
            "time": time.time(),
            "kind": event.kind,
            **axes,
            "payload": payload,
        }


def from_record(record: dict[str, Any]) -> Event:
    """The event of a record.

    Raises:
        ValueError: a field is missing, unknown or of another type, or kind or schema are not ours; the text names it.
    """
    missing, unknown = set(FIELDS) - set(record), set(record) - set(FIELDS)
    if missing or unknown:
        raise ValueError(f"event record: missing {sorted(missing)}, unknown {sorted(unknown)}")
    if record["schema"] != SCHEMA_VERSION:
        raise ValueError(f"event record of schema {record['schema']!r}; this version reads {SCHEMA_VERSION}")
    cls = EVENTS.get(record["kind"])
    if cls is None:
        raise ValueError(f"event record of kind {record['kind']!r}; kinds are {', '.join(sorted(EVENTS))}")
    payload = record["payload"]
    if not isinstance(payload, dict):
        raise ValueError(f"{cls.__name__}: payload must be a mapping, got {type(payload).__name__}")
    own = {field.name for field in dataclasses.fields(cls)} - set(AXES)
    if stray := set(payload) - own:
        raise ValueError(f"{cls.__name__}: unknown {', '.join(sorted(stray))}")
    return from_plain(cls, {**{axis: record[axis] for axis in AXES}, **payload})
