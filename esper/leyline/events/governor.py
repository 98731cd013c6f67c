"""Events of the governor: what it found, how far the run went back, and when seeds may be born again."""

from dataclasses import dataclass
from typing import ClassVar

from esper.leyline.breaker import BreakerPhase
from esper.leyline.events.base import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotTaken(Event):
    """Every rank copied its state into memory; ``copy_ms`` is what rank 0's training stood still for it."""

    kind: ClassVar[str] = "snapshot"
    level: ClassVar[str] = "full"
    bytes: int
    copy_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Panic(Event):
    """A tick was judged sick; the axes say where, so that a penalty can be laid on that step.

    Fields:
        symptom: NONFINITE, DIVERGENCE or COLLAPSE. words: what was measured.
        healthy_step: optimizer step of the last healthy tick; what failed came after it.
    """

    kind: ClassVar[str] = "panic"
    priority: ClassVar[bool] = True
    symptom: str
    words: str
    healthy_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """All ranks went back to one cleared generation; the axes are those of the panic. What is told after this at later
    steps than ``to_step`` takes the place of what was told before it.

    Fields:
        to_step, to_tick: the generation. source: "ram" or "disk". replay: number of this replay since a recovery.
        blamed: slots whose newest change is undone and where none germinates for a time.
        blamed_ticks: when those changes were made, in the order of ``blamed``.
        skipped_from, skipped_steps: the window of samples left out, in optimizer steps; 0, 0 for none.
        recovery_ms, budget_ms: from the verdict until training can go on, on rank 0, and what it may take.
    """

    kind: ClassVar[str] = "rollback"
    priority: ClassVar[bool] = True
    to_step: int
    to_tick: int
    source: str
    replay: int
    blamed: tuple[str, ...]
    blamed_ticks: tuple[int, ...]
    skipped_from: int
    skipped_steps: int
    recovery_ms: float
    budget_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerChanged(Event):
    """The breaker of growth turned; ``manual``: somebody ordered it."""

    kind: ClassVar[str] = "breaker"
    priority: ClassVar[bool] = True
    source: BreakerPhase
    target: BreakerPhase
    ticks_left: int
    reason: str
    manual: bool
