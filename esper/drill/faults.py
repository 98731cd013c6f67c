"""The faults that a drill injects."""

from dataclasses import dataclass
from enum import StrEnum


class FaultKind(StrEnum):
    """The faults of a rank in a tick; the first three remove the rank."""

    LOST_BEFORE_OBSERVE = "lost before observe"
    LOST_BEFORE_COMMIT = "lost between observe and commit"
    LOST_AFTER_COMMIT = "lost after commit"
    MEASURE = "failure in measure"
    DECIDE = "failure in the controller"
    STAGE = "forged stage"
    TICK = "forged tick"
    STEP = "forged step"
    ALPHA = "forged alpha"
    WEIGHT = "forged seed weight"
    HOST = "forged host weight"

    @property
    def loses(self) -> bool:
        """Whether it removes the rank."""
        return self in (FaultKind.LOST_BEFORE_OBSERVE, FaultKind.LOST_BEFORE_COMMIT, FaultKind.LOST_AFTER_COMMIT)


@dataclass(frozen=True, slots=True)
class InjectedFault:
    """One fault: its kind, rank and tick."""

    kind: FaultKind
    rank: int
    tick: int
