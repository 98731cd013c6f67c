"""Events of an ordinary run: its start and end, ticks, commands, gates, stages, births, checkpoints, faults."""

from dataclasses import dataclass
from typing import Any, ClassVar

from esper.leyline.commands import Command
from esper.leyline.events.base import Event
from esper.leyline.evidence import GateResult, GradientHealth, Reading
from esper.leyline.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A process group began or resumed a run."""

    kind: ClassVar[str] = "run_started"
    world_size: int
    """Number of ranks."""

    resumed_from: int | None
    """Optimizer step of the checkpoint that the run goes on from; None: it begins."""

    parameters: int
    """Parameters of the whole network, host and seeds."""

    total_steps: int
    """Optimizer steps of the whole run."""

    slots: tuple[str, ...]
    """Ids of the slots in use, row-major."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEnded(Event):
    """The run ended."""

    kind: ClassVar[str] = "run_ended"
    status: str
    """How, as in STATUS.json."""

    summary: dict[str, Any]
    """The closing figures of a run that is done; else what happened, under ``message``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotLine:
    """One slot in a tick's record."""

    slot: str
    """Slot id, as r0c0."""

    stage: Stage
    """Stage of the slot's life."""

    alpha: float
    """How far the seed is blended in, 0 to 1."""

    effective_alpha: Reading
    """alpha times the mean of g_eff, where the operator is gated; else absent."""

    gate_mean: Reading
    """Mean of g_eff, 0 to 1, over the training samples since the last tick, where the operator is gated; else absent.
    """

    gate_std: Reading
    """Standard deviation of g_eff over the same samples."""

    blueprint: str | None
    """Blueprint of the seed; None: there is no seed."""

    contribution: Reading
    """Mean paired loss without minus with the seed, in nats per sample; positive helps."""

    gradient_norm: Reading
    """Mean L2 norm of the seed's gradient per optimizer step since the last tick, before clipping."""

    gradient_ratio: Reading
    """The seed's gradient norm over the host's in the same window."""

    health: GradientHealth
    """Health of the seed's gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TickDone(Event):
    """The agreed numbers of one tick. Times are rank 0's wall clock and never decide anything."""

    kind: ClassVar[str] = "tick"
    level: ClassVar[str] = "full"
    train_loss: Reading
    """Mean training loss since the last tick, in nats."""

    train_accuracy: Reading
    """Share of training samples since the last tick that were classified correctly, 0 to 1."""

    validation_loss: Reading
    """Loss on the validation part, in nats."""

    validation_accuracy: Reading
    """Share of the validation part that was classified correctly, 0 to 1."""

    lr: float
    """Learning rate of the host at the latest optimizer step."""

    host_gradient_norm: Reading
    """Mean L2 norm of the host's gradient per optimizer step since the last tick, before clipping."""

    host_health: GradientHealth
    """Health of the host's gradient."""

    slots: tuple[SlotLine, ...]
    """One line per slot in use, row-major."""

    parameters: int
    """Parameters of the whole network, host and seeds."""

    live_seeds: int
    """Seeds alive; fossils do not count."""

    flops: int | None
    """FLOPs that training has cost so far; None: nobody keeps an account."""

    steps_ms: float
    """Milliseconds of training since the last tick."""

    tick_ms: float
    """Milliseconds that this tick took."""

    digest_ms: float
    """Milliseconds of it that the digests took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandJudged(Event):
    """A command of the controller was applied; a refused one is a `CommandRefused`."""

    kind: ClassVar[str] = "command"
    command: Command
    """What was asked for."""

    applied: bool
    """Whether it was done."""

    reason: str
    """The controller's reason for an applied command, or why it was refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRefused(CommandJudged):
    """A command that legality, a gate or a budget refused."""

    kind: ClassVar[str] = "refusal"
    priority: ClassVar[bool] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GateJudged(Event):
    """A gate gave its verdict on a command."""

    kind: ClassVar[str] = "gate"
    slot: str
    """Slot id, as r0c0."""

    enforced: bool
    """Whether checks of evidence bind (gates.evidence=enforce)."""

    result: GateResult
    """The verdict, with every check."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageChanged(Event):
    """A slot moved along an edge."""

    kind: ClassVar[str] = "stage"
    slot: str
    """Slot id, as r0c0."""

    source: Stage
    """Stage before."""

    target: Stage
    """Stage from now on."""

    cause: str
    """Name of the command's op (GERMINATE, PRUNE, ...) or of what nobody commanded (RAMP_END, COOLDOWN, QUARANTINE,
    DEGRADED, ROLLBACK).
    """

    generation: int
    """Births in this slot so far."""

    blueprint: str | None
    """Blueprint of the seed; None: there is no seed."""

    proposal: int
    """Id of the command behind it; 0: nobody commanded it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RampCommitted(Event):
    """A path of alpha was agreed on; it begins with the coming optimizer step."""

    kind: ClassVar[str] = "ramp"
    slot: str
    """Slot id, as r0c0."""

    start: float
    """Alpha at the beginning, 0 to 1."""

    target: float
    """Alpha at the end, 0 to 1."""

    first_step: int
    """First optimizer step of the ramp."""

    last_step: int
    """Last optimizer step of the ramp."""

    curve: str
    """Shape: LINEAR, COSINE or SIGMOID."""

    operator: str
    """How the seed joins the host: ADD, MULTIPLY, GATE, CONFIDENCE or CHANNEL."""

    fades_from: str | None
    """Operator that fades out along the ramp; None: the operator stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionMeasured(Event):
    """Paired evidence arrived."""

    kind: ClassVar[str] = "contribution"
    slot: str
    """Slot id, as r0c0."""

    stage: Stage
    """Stage of the seed."""

    look: int
    """Number of this look in the seed's life among those for the same gate, from 1."""

    alpha: float
    """Alpha at which it was measured, 0 to 1."""

    contribution: Reading
    """Mean paired loss without minus with the seed, in nats per sample; positive helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewrapped(Event):
    """The set of parameters that get gradients changed (or a save asked for it) and DDP was wrapped anew."""

    kind: ClassVar[str] = "rewrap"
    cause: str
    """``gradient set changed`` or ``save``."""

    parameters: int
    """Tensors that get gradients."""

    wrap_ms: float
    """Milliseconds that it took."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointSaved(Event):
    """A checkpoint was committed: all ranks' files verified and renamed into place."""

    kind: ClassVar[str] = "checkpoint"
    saved_step: int
    """Optimizer step whose state it holds."""

    path: str
    """Its folder."""

    bytes: int
    """Size of all files, in bytes."""

    save_ms: float
    """Milliseconds of writing, hashing and renaming, beside training."""

    stall_ms: float
    """Milliseconds that training stood still for it: the copy, and the wait for the save before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BirthVetoed(Event):
    """A staged seed was discarded on every rank because one of them could not hold it."""

    kind: ClassVar[str] = "veto"
    priority: ClassVar[bool] = True
    slot: str
    """Slot id, as r0c0."""

    blueprint: str
    """Blueprint of the seed that was discarded."""

    rank: int
    """A rank that could not hold it."""

    reason: str
    """Why: NOT_READY after so many ticks, BUILD_FAILED, OUT_OF_MEMORY, NONFINITE_AT_BIRTH, LIBRARY_MISSING or
    LIBRARY_DAMAGED.
    """

    proposal: int
    """Id of the command that asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotDegraded(Event):
    """A seed runs by a fallback taken at run time, or was pruned because that lasted."""

    kind: ClassVar[str] = "degraded"
    priority: ClassVar[bool] = True
    slot: str
    """Slot id, as r0c0."""

    blueprint: str
    """Blueprint of the seed."""

    ranks: int
    """Number of ranks on which it runs so."""

    reason: str
    """Why, in words, where this rank is one of them; else that it is another."""

    pruned: bool
    """True: pruned because it lasted; false: found so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryUsed(Event):
    """What rank 0's seed library did since the last tick, where it did something."""

    kind: ClassVar[str] = "library"
    level: ClassVar[str] = "full"
    births: int
    """Seeds asked for: found in memory, found on disk, built, or failed."""

    memory_hits: int
    """Seeds found in memory."""

    memory_misses: int
    """Lookups in memory without a hit."""

    disk_hits: int
    """Seeds found on disk."""

    built: int
    """Seeds found nowhere, and built."""

    failed: int
    """Seeds that could not be had."""

    evicted: int
    """Entries let go from memory."""

    entries: int
    """Entries in memory now."""

    bytes: int
    """Size of the entries in memory now, in bytes."""

    oldest_ticks: int
    """Ticks since the entry that goes next was last used."""

    waited_ms: float
    """Milliseconds that rank 0's tick waited for the library."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSkipped(Event):
    """Optimizer steps since the last tick were skipped for a non-finite host gradient."""

    kind: ClassVar[str] = "skipped"
    priority: ClassVar[bool] = True
    count: int
    """Optimizer steps skipped."""

    ranks: tuple[int, ...]
    """Ranks whose loss was not finite; empty: none, so the backward or the reduction overflowed."""

    first_step: int
    """The first optimizer step that was skipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault(Event):
    """Something broke: a damaged checkpoint passed over, a rank lost, a sink gone."""

    kind: ClassVar[str] = "fault"
    priority: ClassVar[bool] = True
    what: str
    """What broke, in words."""

    where: str
    """Where: a slot, a file or folder, a sink, or the phase of a rank."""
