"""The short form of an event's payload: it leaves out what the types say anyway.

    a reading that is absent                  {"status": "ABSENT"}
    one that was measured at the event's tick {"value": 0.31, "se": 0.02, "n": 240}
    a command that only advances              {"slot": "r0c0", "op": "ADVANCE", "proposal": 7}

Most readings of a record are absent, and most fields of a command are not used by its op: the long form of a tick is
more than twice as large. A field is left out where it has the default of its type; a reading's tick where it is the
event's, and its status where it is MEASURED. A field without a default is always there. An event may say to how many
digits its fractions are written (`Event.digits`).
"""

import dataclasses
import functools
import math
import types
import typing
from typing import Any, NamedTuple, cast

from esper.leyline.events.base import Event
from esper.leyline.evidence import Reading, Status
from esper.leyline.plain import to_plain

_SCALARS = (bool, int, float, str, type(None))
_NOTHING = object()


class _Field(NamedTuple):
    name: str
    default: Any  # what may be left out; _NOTHING: it is always there
    plain: Any  # the same as plain data
    holds: type | None  # the dataclass within


def _holds(hint: Any) -> type | None:
    """The dataclass that a field holds, alone, in a tuple or beside None."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return hint
    if typing.get_origin(hint) in (tuple, list, typing.Union, types.UnionType):
        return next((held for part in typing.get_args(hint) if (held := _holds(part)) is not None), None)
    return None


@functools.cache
def _fields(cls: type) -> tuple[_Field, ...]:
    hints = typing.get_type_hints(cls)
    found = []
    for field in dataclasses.fields(cls):
        always = field.default is dataclasses.MISSING
        default = _NOTHING if always else field.default
        plain = None if always else to_plain(default)
        found.append(_Field(field.name, default, plain, _holds(hints[field.name])))
    return tuple(found)


def shorten(event: Event) -> dict[str, Any]:
    """Returns an event as plain data in its short form, axes included."""
    return _short(event, event.tick, event.digits)


def _rounded(number: float, digits: int) -> float:
    return float(f"{number:.{digits}g}") if math.isfinite(number) else number


def _short(value: Any, tick: int, digits: int | None) -> dict[str, Any]:
    short: dict[str, Any] = {}
    for name, default, _, holds in _fields(cast(Any, type(value))):
        item = getattr(value, name)
        if item is default or (default is not _NOTHING and item == default):
            continue
        if digits is not None and type(item) is float:
            short[name] = _rounded(item, digits)
        elif holds is None:
            short[name] = item if isinstance(item, _SCALARS) and type(item) in _SCALARS else to_plain(item)
        elif isinstance(item, tuple | list):
            short[name] = [_short(one, tick, digits) for one in item]
        else:
            short[name] = None if item is None else _short(item, tick, digits)
    if type(value) is Reading and value.status is not Status.ABSENT:
        if value.tick == tick:
            del short["tick"]
        if value.status is Status.MEASURED:
            del short["status"]
    return short


def restore(cls: type[Event], payload: dict[str, Any], tick: int) -> dict[str, Any]:
    """Returns a payload with all that its short form left out; what is missing or unknown besides stays so."""
    return _whole(cls, payload, tick)


def _whole(cls: type, short: dict[str, Any], tick: int) -> dict[str, Any]:
    whole = dict(short)
    if cls is Reading:
        whole.setdefault("status", Status.MEASURED.name)
        if whole["status"] != Status.ABSENT.name:
            whole.setdefault("tick", tick)
    for name, default, plain, holds in _fields(cls):
        if name not in whole:
            if default is not _NOTHING:
                whole[name] = _copy(plain) if isinstance(plain, dict) else plain
        elif holds is not None:
            whole[name] = _within(whole[name], holds, tick)
    return whole


def _copy(plain: dict[str, Any]) -> dict[str, Any]:
    return {key: _copy(item) if isinstance(item, dict) else item for key, item in plain.items()}


def _within(item: Any, holds: type, tick: int) -> Any:
    """What a field holds, whole; what is no mapping is left for the strict reader to refuse."""
    if isinstance(item, dict):
        return _whole(holds, item, tick)
    return [_within(one, holds, tick) for one in item] if isinstance(item, list) else item
