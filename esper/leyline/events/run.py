"""Events of an ordinary run: its start and end, ticks, commands, gates, stages, births, checkpoints, faults."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from esper.leyline.events.base import Event
from esper.leyline.events.task import OF_SESSION, TaskInfo
from esper.leyline.evidence import ABSENT, NO_WORTH, GradientHealth, Reading, SeedWorth
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

    probe: str
    """The looks that the probe affords, in words: samples, clusters, looks of a life, looks in reserve; none: there is
    no probe, so gates of evidence refuse everything."""

    copies: str
    """Copies of the network that continuations hold at most, in words; empty: none (``gates.baseline``)."""

    task: TaskInfo = OF_SESSION
    """What is learned: name, unit of the loss, objective, metrics and their directions; what counts as evidence."""

    uncounted: tuple[str, ...] = ()
    """Operators of host and blueprints that the FLOP account has no formula for; they count for nothing in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsChanged(Event):
    """A setting differs from what it was when the checkpoint was saved that the run goes on from."""

    kind: ClassVar[str] = "settings_changed"
    priority: ClassVar[bool] = True
    key: str
    """Dotted path, as governor.enabled."""

    before: Any
    """Its value when the checkpoint was saved; null if it did not exist."""

    after: Any
    """Its value from here on; null if it does not exist any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunExtended(Event):
    """The run is longer than it was when the checkpoint was saved that it goes on from."""

    kind: ClassVar[str] = "extended"
    priority: ClassVar[bool] = True
    before: int
    """Optimizer steps of the whole run, when the checkpoint was saved."""

    after: int
    """The same from here on."""

    schedule: str
    """Shape of the learning rate after warm-up: constant, cosine or linear."""

    lr_before: float
    """Learning rate of the host that the next optimizer step would have had in the shorter run."""

    lr_after: float
    """The one that it has. If it differs, this is not the run that was so long from the beginning."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlyStopped(Event):
    """The run ends before its last step: a metric has not improved for as long as it may (``trainer.patience``)."""

    kind: ClassVar[str] = "early_stop"
    metric: str
    """The metric that is watched, as validation_loss."""

    best: float | None
    """Its best value."""

    ticks: int
    """Measured ticks without an improvement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCut(Event):
    """The learning rate was cut, since a metric has not improved (``optim.schedule=plateau``)."""

    kind: ClassVar[str] = "rate_cut"
    metric: str
    """The metric that is watched, as validation_loss."""

    lr: float
    """The host's learning rate from here on, after warm-up."""


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
    """Mean of g_eff, 0 to 1, over the training samples since the last tick; absent where the operator is not gated."""

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

    worth: SeedWorth = NO_WORTH
    """What the seed is worth, where it was measured at this tick."""

    gradient_parity: Reading = ABSENT
    """Root mean square of the seed's gradient over the host's."""

    update_parity: Reading = ABSENT
    """Root mean square of what an optimizer step changed in the seed, over the same of the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TickDone(Event):
    """The agreed numbers of one tick. Times are rank 0's wall clock and never decide anything."""

    kind: ClassVar[str] = "tick"
    level: ClassVar[str] = "full"
    train_loss: Reading
    """Mean training loss since the last tick, in the task's unit."""

    train_accuracy: Reading
    """Share of right answers on training samples since the last tick, 0 to 1; absent where none is right or wrong."""

    validation_loss: Reading
    """Loss on the validation part, in the task's unit."""

    validation_accuracy: Reading
    """Share of right answers on the validation part, 0 to 1; absent where the task knows no right or wrong."""

    lr: float
    """Learning rate of the host at the latest optimizer step."""

    host_gradient_norm: Reading
    """Mean L2 norm of the host's gradient per optimizer step since the last tick, before clipping."""

    host_health: GradientHealth
    """Health of the host's gradient."""

    slots: tuple[SlotLine, ...]
    """Slots that changed since the last tick, row-major; all in the first, every 100th and after a rollback."""

    parameters: int
    """Parameters of the whole network, host and seeds."""

    live_seeds: int
    """Seeds alive; fossils do not count."""

    flops: int | None
    """FLOPs that training has cost so far; None: nobody keeps an account."""

    interval_flops: int | None
    """The same since the last tick."""

    samples: int
    """Training samples seen since the last tick, on all ranks."""

    data_ms: float
    """Milliseconds of ``steps_ms`` that rank 0 waited for data."""

    own_ms: float
    """Milliseconds of ``steps_ms`` that rank 0 worked by itself, whatever others did: data and forward."""

    steps_ms: float
    """Milliseconds of training since the last tick."""

    tick_ms: float
    """Milliseconds that this tick took."""

    digest_ms: float
    """Milliseconds of it that the digests took."""

    metrics: dict[str, Reading] = field(default_factory=dict)
    """The task's further metrics by name, as train_f1 and validation_f1."""

    together: Reading = ABSENT
    """Loss that all blended seeds save on the validation part, in nats, where it was measured at this tick."""


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
    critical: ClassVar[bool] = True
    what: str
    """What broke, in words."""

    where: str
    """Where: a slot, a file or folder, a sink, or the phase of a rank."""
