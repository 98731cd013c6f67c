"""Events of seeds: what was asked, judged, moved, measured and built."""

from dataclasses import dataclass
from typing import ClassVar

from esper.leyline.commands import Command
from esper.leyline.events.base import Event
from esper.leyline.evidence import GateResult, Reading
from esper.leyline.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandJudged(Event):
    """A command of the controller was applied; a refused one is a `CommandRefused`."""

    kind: ClassVar[str] = "command"
    command: Command
    """What was asked for; its own ``reason`` is empty where it was applied, since the next field but one has it."""

    applied: bool = True
    """Whether it was done."""

    reason: str
    """The controller's reason for an applied command, or why it was refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandRefused(CommandJudged):
    """A command that legality, a gate or a budget refused."""

    kind: ClassVar[str] = "refusal"
    priority: ClassVar[bool] = True
    applied: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GateJudged(Event):
    """A gate gave its verdict on a command."""

    kind: ClassVar[str] = "gate"
    slot: str
    """Slot id, as r0c0."""

    enforced: bool = True
    """Whether checks of evidence bind (gates.evidence=enforce)."""

    result: GateResult
    """The verdict, with every check of evidence; of those of integrity only the ones that failed."""


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

    blueprint: str | None = None
    """Blueprint of the seed; None: there is no seed."""

    proposal: int = 0
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

    fades_from: str | None = None
    """Operator that fades out along the ramp; None: the operator stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContributionMeasured(Event):
    """Paired evidence arrived."""

    kind: ClassVar[str] = "contribution"
    digits: ClassVar[int | None] = 7  # those of a float32: a look is the largest part of a long record
    slot: str
    """Slot id, as r0c0."""

    stage: Stage
    """Stage of the seed."""

    look: int
    """Number of this look in the seed's life, from 1: which share of the probe it drew, or of ``refill``."""

    alpha: float
    """Alpha at which it was measured, 0 to 1."""

    contribution: Reading
    """Mean paired loss without minus with the seed of this look alone, in nats per sample; positive helps."""

    running: Reading
    """The same over all looks since alpha last moved; the error is over clusters of samples."""

    log_evidence: float | None
    """Log of the e-value of ``running`` for the gate ahead that asks for help, of a fossil for harm; -log(chance) is
    enough. None: too few clusters seen.
    """

    chance: float
    """Chance of luck that this gate allows: of G2 and G6 in a life, of G5 as fixed at birth."""

    clusters: int
    """Clusters of samples behind ``running``."""

    counts: bool = True
    """Whether this look was added to ``running``; if not, its samples had been drawn before, and it is told only."""

    refill: bool = False
    """Whether it drew training samples that had not been trained on, the probe being spent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedContinued(Event):
    """A seed was judged in copies of the network that were trained on with it and without it."""

    kind: ClassVar[str] = "continued"
    slot: str
    """Slot id, as r0c0."""

    number: int
    """Number of this continuation in the seed's life, from 1."""

    first: float | None
    """Loss without minus with the seed after the first of both marks, in nats per sample; None: no evidence, since too
    many samples had a loss that is not finite.
    """

    last: float | None
    """The same after all further steps."""

    expected: float | None
    """The same at the end of the time looked ahead, if it goes on shrinking as it did; nats per sample."""

    lower: float | None
    """Lower end of the one-sided interval of ``expected``."""

    ahead: int | None
    """Optimizer steps looked ahead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedBorn(Event):
    """A seed entered a slot on all ranks: its size, and what it costs."""

    kind: ClassVar[str] = "born"
    slot: str
    """Slot id, as r0c0."""

    blueprint: str
    """Blueprint of the seed."""

    generation: int
    """Births in this slot so far."""

    proposal: int
    """Id of the command that asked for it."""

    parameters: int
    """Parameters that it adds."""

    flops: int
    """FLOPs of one forward over one sample that it adds."""


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
    LIBRARY_DAMAGED, or MOVES_LOSS.
    """

    proposal: int
    """Id of the command that asked for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotDegraded(Event):
    """A seed runs by a fallback taken at run time, or was pruned because that lasted."""

    kind: ClassVar[str] = "degraded"
    priority: ClassVar[bool] = True
    critical: ClassVar[bool] = True
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
