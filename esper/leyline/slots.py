"""Slot ids: ``r{row}c{col}`` in canonical form, parsed, validated and sorted only here.

The row is the depth tier in the host, the column is the place in that tier. Actions go in row-major order; execution
follows the host's own order.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from esper.leyline.errors import ConfigError

_CANONICAL = re.compile(r"r(0|[1-9][0-9]{0,3})c(0|[1-9][0-9]{0,3})")


class SlotPlace(NamedTuple):
    """Depth tier and place in it, both counted from 0."""

    row: int
    col: int

    def __str__(self) -> str:
        return f"r{self.row}c{self.col}"


def parse_slot(text: str, known: Iterable[str] = ()) -> SlotPlace:
    """Returns the place that ``text`` names.

    Args:
        text: a slot id such as ``r0c1``.
        known: the host's slot ids; when given, the id must be one of them.

    Raises:
        ConfigError: the id is not canonical (``R0C0``, ``r00c1``, ``early``) or not a slot of this host.
    """
    known = tuple(known)
    match = _CANONICAL.fullmatch(text) if isinstance(text, str) else None
    hint = f"; this host has {', '.join(known)}" if known else "; write r<row>c<col>, for example r0c1"
    if match is None:
        raise ConfigError(f"slot {text!r}: not a slot id{hint}")
    if known and text not in known:
        raise ConfigError(f"slot {text!r}: no such slot{hint}")
    return SlotPlace(int(match[1]), int(match[2]))


def sort_slots(slots: Iterable[str]) -> tuple[str, ...]:
    """Returns slot ids in row-major order (r2c0 before r10c0).

    Raises:
        ConfigError: an id is not canonical, or appears twice.
    """
    slots = list(slots)
    ordered = tuple(sorted(slots, key=parse_slot))
    if len(set(ordered)) != len(ordered):
        repeated = sorted({slot for slot in slots if slots.count(slot) > 1})
        raise ConfigError(f"slot {', '.join(repeated)}: named twice")
    return ordered
