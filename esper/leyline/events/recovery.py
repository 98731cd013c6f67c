"""Events of the governor: snapshots, panics, shifts, rollbacks, and turns of the breaker."""

from dataclasses import dataclass
from typing import ClassVar

from esper.leyline.breaker import BreakerPhase
from esper.leyline.events.base import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTaken(Event):
    """Every rank copied its state into memory."""

    kind: ClassVar[str] = "snapshot"
    level: ClassVar[str] = "full"
    bytes: int
    """Size of rank 0's copy, in bytes."""

    copy_ms: float
    """Milliseconds that rank 0's training stood still for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panic(Event):
    """A tick was judged sick; the axes say where, so that a penalty can be laid on that step."""

    kind: ClassVar[str] = "panic"
    priority: ClassVar[bool] = True
    critical: ClassVar[bool] = True
    symptom: str
    """NONFINITE, DIVERGENCE or COLLAPSE."""

    words: str
    """What was measured, in words."""

    healthy_step: int
    """Optimizer step of the last healthy tick; what failed came after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LossShifted(Event):
    """A loss was out of line for some ticks and has come to rest, finite and below chance. It is judged by where it is
    from now on, and nothing is taken back.
    """

    kind: ClassVar[str] = "shift"
    priority: ClassVar[bool] = True
    words: str
    """What was measured, in words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """All ranks went back to one cleared generation; the axes are those of the panic. Later events
    beyond ``to_step`` replace earlier ones.
    """

    kind: ClassVar[str] = "rollback"
    priority: ClassVar[bool] = True
    critical: ClassVar[bool] = True
    to_step: int
    """Optimizer step of the generation that all ranks went back to."""

    to_tick: int
    """Tick of that generation."""

    source: str
    """Where the generation came from: ``ram`` or ``disk``."""

    replay: int
    """Number of this replay since a recovery, from 1."""

    blamed: tuple[str, ...]
    """Slots whose newest change is undone and where none germinates for a time."""

    blamed_ticks: tuple[int, ...]
    """Ticks at which those changes were made, in the order of ``blamed``."""

    skipped_from: int
    """First optimizer step of the window of samples left out; 0 with ``skipped_steps`` 0: none is."""

    skipped_steps: int
    """Optimizer steps of the window of samples left out; 0: none is."""

    recovery_ms: float
    """Milliseconds from the verdict until training can go on, on rank 0."""

    budget_ms: float
    """Milliseconds that this may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerChanged(Event):
    """The circuit breaker of growth turned."""

    kind: ClassVar[str] = "breaker"
    priority: ClassVar[bool] = True
    source: BreakerPhase
    """Phase before."""

    target: BreakerPhase
    """Phase from now on."""

    ticks_left: int
    """Ticks left of COOLING; 0 in another phase."""

    reason: str
    """Why, in words."""

    manual: bool
    """Somebody ordered it."""
