"""What every event stands on; the events themselves: `esper.leyline.events.run` and `esper.leyline.events.governor`."""

from dataclasses import dataclass
from typing import ClassVar

SCHEMA_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base: the axes that every event stands on.

    Fields:
        step: optimizer steps done. tick: control ticks done. epoch: passes over the training part begun.
    """

    kind: ClassVar[str] = ""
    level: ClassVar[str] = "lifecycle"  # "lifecycle" or "full"
    priority: ClassVar[bool] = False

    step: int
    tick: int
    epoch: int
