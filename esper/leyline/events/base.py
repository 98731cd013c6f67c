"""The base class of all events and the version of their schema."""

from dataclasses import dataclass
from typing import ClassVar

SCHEMA_VERSION = 5
READABLE = (2, 3, 4, 5)  # older ones of which some kinds are as they were; a kind that is not says which field it lacks


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base: the axes that every event stands on."""

    kind: ClassVar[str] = ""
    level: ClassVar[str] = "lifecycle"  # "lifecycle" or "full"
    priority: ClassVar[bool] = False  # written at every level, and flushed at once
    critical: ClassVar[bool] = False  # besides never dropped
    digits: ClassVar[int | None] = None  # significant digits to which a record has its fractions; None: all

    step: int
    """Optimizer steps done."""

    tick: int
    """Control ticks done."""

    epoch: int
    """Passes over the training part begun."""
