"""Settings of the training loop."""

from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.checks import Checks
from esper.tolaria.checkpoint.config import Objective


class Precision(StrEnum):
    """Number format of parameters and compute; BF16 keeps float32 parameters under autocast."""

    FP32 = "fp32"
    FP64 = "fp64"
    BF16 = "bf16"


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
