"""Settings of the training loop."""

from dataclasses import dataclass, field
from enum import StrEnum

from esper.leyline.fields import Checks
from esper.tolaria.checkpoint.config import Objective


class Precision(StrEnum):
    """Number format of parameters and compute; BF16 keeps float32 parameters under autocast."""

    FP32 = "fp32"
    FP64 = "fp64"
    BF16 = "bf16"


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

    precision: Precision = Precision.FP32
    """Number format: ``fp32``, ``fp64``, or ``bf16``, which keeps float32 parameters under autocast."""

    max_consecutive: int = 20
    """Optimizer steps skipped in a row for a non-finite host gradient that end the run as diverged."""

    max_skips: int = 5
    """Skipped optimizer steps in a row after which a tick comes at once and the newest blending seed is pruned."""

    objective: Objective = Objective.VALIDATION_ACCURACY
    """What the run returns to a sweep and what chooses the best checkpoint: ``validation_loss`` or
    ``validation_accuracy``.
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

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the run."""
        return self.steps or self.epochs * steps_per_epoch

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("compile_backend", self.compile_backend != "", "must name a backend of torch.compile")
            check("steps", self.steps is None or self.steps >= 1, "must be >= 1, or null for trainer.epochs")
            for name in ("epochs", "batch", "eval_batch", "accumulate", "max_consecutive", "max_skips"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("ema", self.ema is None or 0.0 < self.ema < 1.0, "must be > 0 and < 1, or null for no average")
            check("ema_validate", not self.ema_validate or self.ema is not None, "needs trainer.ema, such as 0.999")
            check("accumulate", self.accumulate <= self.batch, "must not exceed trainer.batch")
            check("max_skips", self.max_skips <= self.max_consecutive, "must not exceed trainer.max_consecutive")
