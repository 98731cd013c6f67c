"""Settings of the training loop."""

from dataclasses import dataclass, field
from enum import StrEnum

from esper.leyline.fields import Checks


class Precision(StrEnum):
    """Number format of parameters and compute; BF16 and FP16 keep float32 parameters under autocast."""

    FP32 = "fp32"
    FP64 = "fp64"
    BF16 = "bf16"
    FP16 = "fp16"


@dataclass(kw_only=True, slots=True)
class TrainerConfig:
    """Length, batch and precision of a run."""

    steps: int | None = None
    """Optimizer steps of the run; null: ``epochs`` decides."""

    epochs: int = 100
    """Passes over the training part; without effect where ``steps`` is set."""

    batch: int = 64
    """Samples per optimizer step over *all* ranks and accumulation windows, independent of the number of ranks."""

    drop_last: bool = False
    """The last batch of an epoch is left out where it would be short, with other samples in each epoch. Validation and
    test count every sample.
    """

    eval_batch: int = 256
    """Samples per rank and forward in evaluation."""

    accumulate: int = 1
    """Forward and backward passes per optimizer step."""

    max_tokens: int | None = None
    """Tokens of a rank's forward pass at most: a step has as many passes as that takes, ``accumulate`` at least. For
    data that are tokens; null: no bound.
    """

    recompute: bool = False
    """Activation checkpointing: blocks of the hosts gpt, cnn and resnet20 keep no activations, and the backward
    computes them again; less memory for about a third more time, to the same bits.
    """

    precision: Precision = Precision.FP32
    """Number format: ``fp32``, ``fp64``, or ``bf16`` and ``fp16``, which keep float32 parameters under autocast; with
    ``fp16`` the loss is scaled, by one scale for all ranks.
    """

    max_consecutive: int = 20
    """Optimizer steps skipped in a row for a non-finite host gradient that end the run as diverged."""

    max_skips: int = 5
    """Skipped optimizer steps in a row after which a tick comes at once and the newest blending seed is pruned."""

    objective: str | None = None
    """What the run returns to a sweep and what chooses the best checkpoint: ``validation_loss``,
    ``validation_accuracy``, or ``validation_`` and the name of a metric of the task; null: the task's own, which is the
    accuracy of classification and language.
    """

    watch: str | None = None
    """Metric by which ``patience`` and ``optim.schedule=plateau`` go, as validation_loss; null: ``objective``."""

    patience: int | None = None
    """Ticks that measured ``watch`` without an improvement after which the run ends; null: it goes on to its last step.
    """

    min_improvement: float = 0.0
    """Improvement of ``watch`` that counts, in its own unit."""

    limit: int | None = None
    """A quick try: at most so many optimizer steps, and so many batches of ``eval_batch`` samples of each part that is
    measured whole, the test read included; null: everything.
    """

    average_buffers: list[str] = field(default_factory=list)
    """Names of the host's float buffers, with * and ?, that are averaged over ranks at each tick, as running statistics
    of norm layers always are; [queue, "*.ema_*"].
    """

    deterministic: bool = False
    """torch.use_deterministic_algorithms."""

    channels_last: bool = False
    """Images go to the host in channels-last memory format, in which convolutions and pooling are often faster; the
    same sums in another order.
    """

    compile: bool = False
    """torch.compile, region by region (see `esper.kasmina.compiler`); seeds are compiled before they are planted. The
    final test runs uncompiled.
    """

    compile_backend: str = "inductor"
    """Backend of torch.compile."""

    ema: float | None = None
    """Share of an average of the weights that one optimizer step keeps, in (0, 1), such as 0.999; null: no average. It
    grows and is pruned with the network and lies in every checkpoint; see docs/ema.md.
    """

    ema_validate: bool = False
    """Validation and the final test compute with ``ema``'s average instead of the weights; so the governor, the
    controller and the choice of the best checkpoint see it, too.
    """

    resume_from: str | None = None
    """RUN of another run that this one goes on from: weights, growth, moments and account are those of its checkpoint,
    settings and length are this run's own. The checkpoint must lie where the learning rate was stable; what it has
    cost is recorded as sunk (RUN/origin.json). null: from nothing.
    """

    resume_step: int | None = None
    """Step of the checkpoint of ``resume_from``; null: the newest that lies in the stable part."""

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        steps = self.steps or self.epochs * steps_per_epoch
        return steps if self.limit is None else min(steps, self.limit)

    def __post_init__(self) -> None:
        with Checks(self) as check:
            named = self.objective is None or self.objective.startswith("validation_")
            check("objective", named, "must be validation_loss or validation_<metric>, or null for the task's own")
            check("patience", self.patience is None or self.patience >= 1, "ticks, must be >= 1, or null")
            check("min_improvement", self.min_improvement >= 0, "must be >= 0")
            check("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "must be >= 1, or null for no bound")
            check("recompute", not (self.recompute and self.compile), "does not go with trainer.compile")
            check("limit", self.limit is None or self.limit >= 1, "must be >= 1, or null for everything")
            check("compile_backend", self.compile_backend != "", "must name a backend of torch.compile")
            check("steps", self.steps is None or self.steps >= 1, "must be >= 1, or null for trainer.epochs")
            for name in ("epochs", "batch", "eval_batch", "accumulate", "max_consecutive", "max_skips"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("ema", self.ema is None or 0.0 < self.ema < 1.0, "must be > 0 and < 1, or null for no average")
            check("ema_validate", not self.ema_validate or self.ema is not None, "needs trainer.ema, such as 0.999")
            check("resume_step", self.resume_step is None or self.resume_from is not None, "needs trainer.resume_from")
            check("accumulate", self.accumulate <= self.batch, "must not exceed trainer.batch")
            check("max_skips", self.max_skips <= self.max_consecutive, "must not exceed trainer.max_consecutive")
