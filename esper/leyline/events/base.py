"""The base class of all events and the version of their schema."""

from dataclasses import dataclass
from typing import ClassVar

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base: the axes that every event stands on."""

    kind: ClassVar[str] = ""
    level: ClassVar[str] = "lifecycle"  # "lifecycle" or "full"
    priority: ClassVar[bool] = False

    step: int
    """Optimizer steps done."""

    tick: int
    """Control ticks done."""

    epoch: int
    """Passes over the training part begun."""
