"""Typed, frozen events: what happened in a run, on explicit axes.

The emitter adds the envelope (run id, attempt, sequence number, rank, schema version, wall-clock time). Events whose
class says ``priority`` (refusals, vetoes, faults) are written at every telemetry level, flushed at once, never dropped.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from esper.leyline.commands import Command
from esper.leyline.events.base import SCHEMA_VERSION as SCHEMA_VERSION
from esper.leyline.events.base import Event as Event
from esper.leyline.events.governor import BreakerChanged, Panic, RolledBack, SnapshotTaken
from esper.leyline.evidence import GateResult, GradientHealth, Reading
from esper.leyline.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A process group began or resumed a run."""

    kind: ClassVar[str] = "run_started"
    world_size: int
    resumed_from: int | None
    parameters: int
    total_steps: int
    slots: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Event):
    """The run ended; ``status`` as in STATUS.json."""

    kind: ClassVar[str] = "run_ended"
    status: str
    summary: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLine:
    """One slot in a tick's record."""

    slot: str
    stage: Stage
    alpha: float
    effective_alpha: Reading  # alpha times the mean of g_eff, where the operator is gated
    gate_mean: Reading
    gate_std: Reading
    blueprint: str | None
    contribution: Reading
    gradient_norm: Reading
    gradient_ratio: Reading
    health: GradientHealth


@dataclass(frozen=True, slots=True, kw_only=True)
class TickDone(Event):
    """The agreed numbers of one tick.

    ``flops`` is what training has cost so far. ``*_ms`` are rank 0's wall clock since the last tick and never decide.
    """

    kind: ClassVar[str] = "tick"
    level: ClassVar[str] = "full"
    train_loss: Reading
    train_accuracy: Reading
    validation_loss: Reading
    validation_accuracy: Reading
    lr: float
    host_gradient_norm: Reading
    host_health: GradientHealth
    slots: tuple[SlotLine, ...]
    parameters: int
    live_seeds: int
    flops: int | None
    steps_ms: float
    tick_ms: float
    digest_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandJudged(Event):
    """A proposal and its verdict: ``applied``, or refused with the reason."""

    kind: ClassVar[str] = "command"
    command: Command
    applied: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRefused(CommandJudged):
    """A proposal that legality, a gate or a budget refused."""

    kind: ClassVar[str] = "refusal"
    priority: ClassVar[bool] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GateJudged(Event):
    """A gate gave its verdict on a command."""

    kind: ClassVar[str] = "gate"
    slot: str
    enforced: bool
    result: GateResult


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChanged(Event):
    """A slot moved along an edge."""

    kind: ClassVar[str] = "stage"
    slot: str
    source: Stage
    target: Stage
    cause: str
    generation: int
    blueprint: str | None
    proposal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RampCommitted(Event):
    """A path of alpha was agreed."""

    kind: ClassVar[str] = "ramp"
    slot: str
    start: float
    target: float
    first_step: int
    last_step: int
    curve: str
    operator: str
    fades_from: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionMeasured(Event):
    """Paired evidence arrived: loss without minus with the seed, in nats per sample."""

    kind: ClassVar[str] = "contribution"
    slot: str
    stage: Stage
    look: int
    alpha: float
    contribution: Reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrapped(Event):
    """The set of parameters that get gradients changed (or a save asked for it) and DDP was wrapped anew."""

    kind: ClassVar[str] = "rewrap"
    cause: str
    parameters: int
    wrap_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint was committed (all ranks' files verified and renamed into place).

    ``save_ms``: writing, hashing and renaming, beside training; ``stall_ms``: what training stood still for it (the
    copy, and the wait for the save before it).
    """

    kind: ClassVar[str] = "checkpoint"
    saved_step: int
    path: str
    bytes: int
    save_ms: float
    stall_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BirthVetoed(Event):
    """A staged seed was discarded on every rank because one of them could not hold it."""

    kind: ClassVar[str] = "veto"
    priority: ClassVar[bool] = True
    slot: str
    blueprint: str
    rank: int
    reason: str
    proposal: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotDegraded(Event):
    """A seed runs by a fallback taken at run time: found so (``pruned`` false), or pruned because it lasted.

    Fields:
        ranks: how many run it so. reason: in words where this rank is one of them, else that it is another.
    """

    kind: ClassVar[str] = "degraded"
    priority: ClassVar[bool] = True
    slot: str
    blueprint: str
    ranks: int
    reason: str
    pruned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryUsed(Event):
    """What rank 0's seed library did since the last tick, where it did something.

    ``births`` are seeds asked for: found in memory, or on disk, or built, or failed. ``entries`` and ``bytes`` are in
    memory now, ``oldest_ticks`` is the age of the one that goes next, by its last use. ``waited_ms`` is rank 0's wall
    clock.
    """

    kind: ClassVar[str] = "library"
    level: ClassVar[str] = "full"
    births: int
    memory_hits: int
    memory_misses: int
    disk_hits: int
    built: int
    failed: int
    evicted: int
    entries: int
    bytes: int
    oldest_ticks: int
    waited_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSkipped(Event):
    """Optimizer steps since the last tick were skipped for a non-finite host gradient."""

    kind: ClassVar[str] = "skipped"
    priority: ClassVar[bool] = True
    count: int
    ranks: tuple[int, ...]  # whose loss was not finite; empty: none, so the backward or the reduction overflowed
    first_step: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault(Event):
    """Something broke: a damaged checkpoint passed over, a rank lost, a sink gone."""

    kind: ClassVar[str] = "fault"
    priority: ClassVar[bool] = True
    what: str
    where: str


EVENTS: dict[str, type[Event]] = {
    cls.kind: cls
    for cls in (
        RunStarted,
        RunEnded,
        TickDone,
        CommandJudged,
        CommandRefused,
        GateJudged,
        StageChanged,
        RampCommitted,
        ContributionMeasured,
        Rewrapped,
        CheckpointSaved,
        BirthVetoed,
        LibraryUsed,
        SlotDegraded,
        StepSkipped,
        SnapshotTaken,
        Panic,
        RolledBack,
        BreakerChanged,
        Fault,
    )
}
_all_kinds = {cls.kind for cls in (*Event.__subclasses__(), *CommandJudged.__subclasses__())}
if set(EVENTS) != _all_kinds:
    raise AssertionError(f"events without a row in the table: {_all_kinds ^ set(EVENTS)}")
