"""Settings of the training engine: optimizer, trainer, lockstep, checkpoints, governor, world."""

from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.checks import Checks


class OptimizerKind(StrEnum):
    """torch.optim.SGD or torch.optim.AdamW."""

    SGD = "sgd"
    ADAMW = "adamw"


class Schedule(StrEnum):
    """Shape of the learning rate over the run, after warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


class Precision(StrEnum):
    """Number format of parameters and compute; BF16 keeps float32 parameters under autocast."""

    FP32 = "fp32"
    FP64 = "fp64"
    BF16 = "bf16"


class Objective(StrEnum):
    """What a run returns to a sweep, and what chooses the best checkpoint."""

    VALIDATION_LOSS = "validation_loss"
    VALIDATION_ACCURACY = "validation_accuracy"


class Device(StrEnum):
    """CPU: gloo. GPU: one CUDA device a rank, NCCL for data, gloo for control."""

    CPU = "cpu"
    GPU = "gpu"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """One optimizer for the host and all seeds, each in a parameter group of its own.

    Fields:
        kind: sgd or adamw.
        lr: peak learning rate of the host.
        weight_decay: decoupled for adamw, L2 for sgd; not applied to tensors of one axis.
        momentum: sgd only.
        beta1, beta2, eps: adamw only.
        schedule: shape after warm-up. warmup_steps: linear warm-up of the host.
        final_lr_fraction: share of the peak at the last step, for cosine and linear.
        fused: one kernel for a whole group, and gradients judged on the device, so that no step waits for it; null: on
            GPUs alone.
        clip_norm: L2 norm to which each owner's gradient (host, each slot) is clipped by itself; null is off.
        seed_lr_scale: learning rate of seeds as a multiple of the host's at the same step.
        seed_warmup_steps: linear warm-up of a seed from the first step in which it learns.
        seed_weight_decay: weight decay of seeds.
        vanishing_rms, exploding_rms: root mean square of a tensor's gradient below which it is told as vanishing (the
            default is where AdamW's ``eps`` begins to swallow updates), above which as exploding.
        health_every: optimizer steps between two samples of gradient health; the first after a tick always is one.
    """

    kind: OptimizerKind = OptimizerKind.ADAMW
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    fused: bool | None = None
    schedule: Schedule = Schedule.COSINE
    warmup_steps: int = 0
    final_lr_fraction: float = 0.1
    clip_norm: float | None = 1.0
    seed_lr_scale: float = 2.0
    seed_warmup_steps: int = 20
    seed_weight_decay: float = 0.0
    vanishing_rms: float = 1e-8
    exploding_rms: float = 100.0
    health_every: int = 10

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("lr", self.lr > 0, "must be > 0")
            for name in ("weight_decay", "seed_weight_decay"):
                check(name, getattr(self, name) >= 0, "must be >= 0")
            for name in ("momentum", "beta1", "beta2"):
                check(name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
            check("eps", self.eps > 0, "must be > 0")
            for name in ("warmup_steps", "seed_warmup_steps"):
                check(name, getattr(self, name) >= 0, "optimizer steps, must be >= 0")
            check("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "must be in [0, 1]")
            check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "must be > 0, or null for no clipping")
            check("seed_lr_scale", self.seed_lr_scale > 0, "must be > 0")
            check("vanishing_rms", self.vanishing_rms >= 0, "must be >= 0")
            check("exploding_rms", self.exploding_rms > self.vanishing_rms, "must be > optim.vanishing_rms")
            check("health_every", self.health_every >= 1, "optimizer steps, must be >= 1")


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """Length, batch and precision of a run.

    Fields:
        steps: optimizer steps; null: ``epochs`` decides. epochs: passes over the training part.
        batch: samples per optimizer step over *all* ranks and accumulation windows, independent of world size.
        eval_batch: samples per rank and forward in evaluation.
        accumulate: forward/backward passes per optimizer step.
        precision: fp32, fp64 or bf16 (autocast).
        max_consecutive: optimizer steps skipped in a row for a non-finite host gradient that end the run as diverged.
        max_skips: skipped steps in a row after which a tick comes at once and the newest blending seed is pruned.
        objective: what the run returns to a sweep and what chooses the best checkpoint.
        deterministic: torch.use_deterministic_algorithms.
        channels_last: images go to the host in channels-last memory format, in which convolutions and pooling are often
            faster; the same sums in another order.
        compile: torch.compile, region by region (see `esper.kasmina.compiler`); the final test runs uncompiled.
        compile_backend: of torch.compile.
    """

    steps: int | None = None
    epochs: int = 100
    batch: int = 64
    eval_batch: int = 256
    accumulate: int = 1
    precision: Precision = Precision.FP32
    max_consecutive: int = 20
    max_skips: int = 5
    objective: Objective = Objective.VALIDATION_ACCURACY
    deterministic: bool = False
    channels_last: bool = False
    compile: bool = False
    compile_backend: str = "inductor"

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("compile_backend", self.compile_backend != "", "must name a backend of torch.compile")
            check("steps", self.steps is None or self.steps >= 1, "must be >= 1, or null for trainer.epochs")
            for name in ("epochs", "batch", "eval_batch", "accumulate", "max_consecutive", "max_skips"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("accumulate", self.accumulate <= self.batch, "must not exceed trainer.batch")
            check("max_skips", self.max_skips <= self.max_consecutive, "must not exceed trainer.max_consecutive")


@dataclass(kw_only=True, slots=True)
class ControlConfig:
    """The control tick and the lockstep protocol.

    Fields:
        every: optimizer steps between ticks; 0: one at each epoch's end and at least every ``max_steps``.
        max_steps: no more optimizer steps than this between two ticks.
        digest_every: ticks between digests of all parameters (live seeds are digested at every tick).
        validate_every: ticks between validations.
        stage_ticks: ticks that a staged seed may stay not ready before it is discarded.
        timeout_s: seconds after which a missing rank is an error, in every process group.
        slow_timeout_s: the same for what may rightly take longer: the step after a growth, a save, or a save's commit.
        startup_timeout_s: the same for start-up, load, the last save and the final test.
    """

    every: int = 50
    max_steps: int = 200
    digest_every: int = 4
    validate_every: int = 1
    stage_ticks: int = 4
    timeout_s: float = 60.0
    slow_timeout_s: float = 300.0
    startup_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("every", self.every >= 0, "optimizer steps, must be >= 1, or 0 for each epoch's end")
            check("every", self.every <= self.max_steps, "must not exceed control.max_steps")
            for name in ("max_steps", "digest_every", "validate_every", "stage_ticks"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            for name in ("timeout_s", "slow_timeout_s", "startup_timeout_s"):
                check(name, getattr(self, name) >= 1, "seconds, must be >= 1")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When to save and what to keep.

    Fields:
        every_ticks: ticks between saves; 0 saves only at a stop and at the end.
        keep: newest checkpoints kept; the best one and the newest valid one are kept besides.
    """

    every_ticks: int = 10
    keep: int = 3

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("every_ticks", self.every_ticks >= 0, "ticks, must be >= 0")
            check("keep", self.keep >= 1, "must be >= 1")


@dataclass(kw_only=True, slots=True)
class GovernorConfig:
    """When a run is judged sick, what it goes back to, and how long growth waits then.

    Fields:
        enabled: judge at every tick, keep snapshots, roll back.
        history: losses of healthy ticks that a new one is compared with. min_history: fewer say nothing.
        deviations: robust standard deviations (1.4826 times the median absolute deviation) above the median, and
        rise: nats as a share of the chance level, that a loss must *both* exceed to be out of line.
        patience: ticks out of line in a row that are a panic; what is not finite is one at once.
        blowup: multiples of the chance level (or of the least loss so far, if that is more) above which a training loss
        has diverged however it came there.
        collapse: share of the chance level from which a training loss is collapsed, if its median had been below
        clearly_better: another share of it.
        snapshot_ticks: ticks between snapshots in memory; a save takes one too. ring: how many are kept, by each rank.
        blame_ticks: a change in a slot older than this, in ticks, is not blamed.
        embargo_ticks: ticks for which no seed germinates in a slot that was blamed.
        max_replays: rollbacks without a recovery between them, after which the run ends as diverged.
        recover_ticks: healthy ticks beyond the tick of the panic that are a recovery.
        cool_ticks: ticks without births after the first panic that growth is blamed for; each further one doubles it.
        trial_ticks: healthy ticks that one seed must then stand blended before others may be born.
        max_trips: panics that growth is blamed for, without a success between them, after which births stay forbidden.
    """

    enabled: bool = True
    history: int = 16
    min_history: int = 8
    deviations: float = 6.0
    rise: float = 0.1
    patience: int = 2
    blowup: float = 3.0
    collapse: float = 0.95
    clearly_better: float = 0.8
    snapshot_ticks: int = 5
    ring: int = 3
    blame_ticks: int = 10
    embargo_ticks: int = 50
    max_replays: int = 3
    recover_ticks: int = 10
    cool_ticks: int = 20
    trial_ticks: int = 5
    max_trips: int = 3

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("min_history", self.min_history >= 3, "ticks, must be >= 3")
            check("history", self.history >= self.min_history, "ticks, must not be below governor.min_history")
            check("deviations", self.deviations > 0, "must be > 0")
            check("rise", self.rise > 0, "must be > 0")
            for name in ("patience", "snapshot_ticks", "blame_ticks", "cool_ticks", "trial_ticks", "max_trips"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("blowup", self.blowup > 1, "must be > 1")
            check("clearly_better", 0 < self.clearly_better < self.collapse, "must be between 0 and governor.collapse")
            check("ring", self.ring >= 2, "must be >= 2: one that is cleared, and one that is yet to be")
            for name in ("embargo_ticks", "max_replays", "recover_ticks"):
                check(name, getattr(self, name) >= 0, "must be >= 0")


@dataclass(kw_only=True, slots=True)
class WorldConfig:
    """Processes and devices.

    Fields:
        device: cpu (gloo) or gpu (``cuda:LOCAL_RANK``; NCCL for data, gloo for control).
        nproc_per_node: ranks per host. nnodes: hosts.
        rdzv_endpoint: ``host:port`` of the first host's rendezvous; needed when nnodes > 1. ``slurm``: inside a Slurm
            job, whose hosts, time limit and restart count are then asked of Slurm.
        rdzv_id: name that the hosts of one job share; needed when nnodes > 1.
        max_restarts: times that torchrun starts the workers anew after a failure; each resumes from the newest
            checkpoint.
        threads: intra-op threads per rank.
        find_unused: DDP looks for parameters without a gradient in every step.
        grace_s: seconds that a stopped launcher gives its workers before it ends them.
    """

    device: Device = Device.CPU
    nproc_per_node: int = 2
    nnodes: int = 1
    rdzv_endpoint: str | None = None
    rdzv_id: str | None = None
    max_restarts: int = 0
    threads: int = 1
    find_unused: bool = False
    grace_s: float = 60.0

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("nproc_per_node", "nnodes", "threads"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("max_restarts", self.max_restarts >= 0, "must be >= 0")
            check("grace_s", self.grace_s > 0, "seconds, must be > 0")
            for name in ("rdzv_endpoint", "rdzv_id") if self.rdzv_endpoint != "slurm" else ():
                check(name, self.nnodes == 1 or getattr(self, name) is not None, "needed when world.nnodes > 1")
