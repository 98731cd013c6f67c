"""The page of all events, made from their classes: ``python -m esper.leyline.events.reference > docs/events.md``."""

import dataclasses
import enum
import types
import typing
from collections.abc import Iterator
from typing import Any

from esper.leyline.events.base import SCHEMA_VERSION, Event
from esper.leyline.events.table import EVENTS
from esper.leyline.events.words import UNITS, WHEN
from esper.leyline.evidence import Reading
from esper.leyline.fields import as_markdown, class_doc, field_docs
from esper.leyline.plain import to_plain

_HEAD = f"""# Events

What a run tells: one JSON object per line in the event files of the run directory. Made from `esper/leyline/events/`
by `python -m esper.leyline.events.reference`; write there, not here.

A line is an envelope (`schema`, now {SCHEMA_VERSION}; `run_id`; `attempt`, from 1; `rank`; `seq`, a number per process
that leaves a gap where a line was dropped; `time`, seconds since 1970; `kind`), the axes below, and the event's own
fields under `payload`. Enums are written by the names of their members.

Each event has a level: `telemetry.level=lifecycle` writes those of level *lifecycle*, `full` writes all. Events with
*priority* (refusals, vetoes, faults) are written at every level and flushed at once. *Critical* ones (fault, panic,
rollback, fallback of a seed) are besides never dropped: while RUN takes nothing they are in a file below
`telemetry.spill`, which the next attempt brings home. Of all others a full queue drops some, counts them by kind, and
says so in a last `fault`.

A line is short: it leaves out what goes without saying. A field with something under *left out* is not there when it
has that value; all others always are. Of a `Reading`, `tick` is left out where it is the event's own, and `status`
where it is MEASURED, so that `{{"value": 0.31, "n": 240}}` was measured at this tick and `{{"status": "ABSENT"}}` was
not measured. `esper.nissa.reading` and `esper query` give all of it. Some events have their fractions to so many
significant digits, which is said there.

At level *lifecycle* a million steps with 48 slots and a tick at every fiftieth come to 34 MB by default settings (two
seeds live at a time, eight looks a life), and to 86 MB where each slot lives a whole life of five looks in every
hundred ticks, to its prune, 98 MB with eight looks (`tests/nissa/test_sizes.py`). A look is some 430 bytes.
"""


def _parts(hint: Any) -> Iterator[type]:
    """The classes within a type."""
    if typing.get_args(hint):
        for option in typing.get_args(hint):
            yield from _parts(option)
    elif isinstance(hint, type):
        yield hint


def _type(hint: Any) -> str:
    """A type as a person reads it: ``tuple of int``, ``str or None``."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(option) for option in options)
    if origin is tuple:
        return f"list of {_type(options[0])}"
    if origin is dict:
        return "mapping"
    if hint is type(None):
        return "null"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"[{hint.__name__}](#names)"
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return f"[{hint.__name__}](#type-{hint.__name__.lower()})"
    return hint.__name__


def _left_out(field: Any) -> str:
    """The value of a nested field with which it is not written."""
    if field.default is dataclasses.MISSING:
        return ""
    plain = to_plain(field.default)
    if not isinstance(plain, dict):
        return "null" if plain is None else str(plain) if plain or isinstance(plain, int | float) else "empty"
    return "absent" if isinstance(field.default, Reading) else "all absent"


def _table(cls: type, leave_out: frozenset[str]) -> list[str]:
    hints, docs = typing.get_type_hints(cls), field_docs(cls)
    names = [field.name for field in dataclasses.fields(cls) if field.name not in leave_out]
    if not names:
        return []
    rows = [
        f"| `{name}` | {_type(hints[name])} | {UNITS[name] if has_unit(hints[name]) else ''} "
        f"| {as_markdown(docs[name]).replace('None', 'null')} |"
        for name in names
    ]
    if all(field.default is dataclasses.MISSING for field in dataclasses.fields(typing.cast(Any, cls))):
        return ["| field | type | unit | meaning |", "|---|---|---|---|", *rows, ""]
    said = {field.name: _left_out(field) for field in dataclasses.fields(typing.cast(Any, cls))}
    rows = [f"{row} {said[name]} |" for name, row in zip(names, rows)]
    return ["| field | type | unit | meaning | left out |", "|---|---|---|---|---|", *rows, ""]


def has_unit(hint: Any) -> bool:
    """Whether a field holds numbers."""
    return any(part in (int, float, Reading) for part in _parts(hint))


def nested_types() -> tuple[list[type], list[type[enum.Enum]]]:
    """Dataclasses and enums that fields of events hold, each in the order in which they come up."""
    classes: list[type] = []
    enums: list[type[enum.Enum]] = []
    ahead: list[type] = list(EVENTS.values())
    while ahead:
        hints = typing.get_type_hints(ahead.pop(0))
        for part in (part for hint in hints.values() for part in _parts(hint)):
            if issubclass(part, enum.Enum):
                if part not in enums:
                    enums.append(part)
            elif dataclasses.is_dataclass(part) and part not in classes:
                classes.append(part)
                ahead.append(part)
    return classes, enums


def page() -> str:
    """The whole page as Markdown."""
    axes = frozenset(field.name for field in dataclasses.fields(Event))
    lines = [_HEAD, "## Axes of every event", "", *_table(Event, frozenset())]
    for kind, cls in EVENTS.items():
        lines += [f"## {kind}", "", as_markdown(class_doc(cls)), ""]
        digits = f"; fractions to {cls.digits} digits" if cls.digits else ""
        urgency = "; critical" if cls.critical else "; priority" if cls.priority else ""
        lines += [f"`{cls.__name__}`; level {cls.level}{urgency}{digits}; said {WHEN[kind]}.", ""]
        lines += _table(cls, axes)
    classes, enums = nested_types()
    for nested in classes:
        lines += [f"## Type {nested.__name__}", "", as_markdown(class_doc(nested)), "", *_table(nested, frozenset())]
    lines += ["## Names", "", "| enum | names |", "|---|---|"]
    lines += [f"| {names.__name__} | {', '.join(member.name for member in names)} |" for names in enums]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(page(), end="")
