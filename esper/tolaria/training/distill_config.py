"""Settings of a distillation. Nothing here needs torch."""

from dataclasses import dataclass
from typing import Any

from esper.leyline.fields import Checks
from esper.leyline.imports import is_dotted
from esper.leyline.slots import sort_slots


@dataclass(kw_only=True, slots=True)
class DistillConfig:
    """Who teaches, and what its word weighs. Without ``run`` and ``path`` there is no teacher."""

    run: str | None = None
    """Run directory whose network teaches, as one of its checkpoints has it; null: no run teaches."""

    step: int | None = None
    """Optimizer step of that checkpoint; null: the one that validation chose. Name it where the teacher still trains.
    """

    trust: bool = False
    """``distill.run`` may name code of its own (``host.path``) although it is somebody else's, or others may write it.
    """

    path: str | None = None
    """``package.module:function`` that returns a teacher of your own, called with ``input_shape`` and ``classes``;
    null: none.
    """

    options: dict[str, Any] | None = None
    """Further keyword arguments of that function, {depth: 20}; null: none."""

    weight: float = 1.0
    """Weight of the soft targets, in units of the task's loss."""

    temperature: float = 2.0
    """T of both softmaxes."""

    features: dict[str, str] | None = None
    """Slot id -> dotted name of the teacher's module that the features there are drawn to, {r0c0: layer1}; null: none.
    """

    feature_weight: float = 1.0
    """Weight of each such pair of features."""

    until_step: int | None = None
    """Optimizer step at which the teacher is let go; null: never."""

    def __post_init__(self) -> None:
        sort_slots(self.features or ())
        with Checks(self) as check:
            check("run", self.run is None or self.run.strip() != "", "must name a run directory, or be null")
            check("path", self.path is None or is_dotted(self.path), "write package.module:function, or null")
            check("path", self.path is None or self.run is None, "one teacher at a time: distill.run or distill.path")
            check("step", self.step is None or self.run is not None, "goes with distill.run")
            check("step", self.step is None or self.step >= 1, "optimizer steps, must be >= 1")
            reserved = {"input_shape", "classes"} & set(self.options or ())
            check("options", not reserved, "input_shape and classes are given by the data; leave them out")
            check("options", self.path is not None or not self.options, "go with distill.path")
            check("weight", self.weight >= 0, "must be >= 0")
            check("weight", self.weight > 0 or bool(self.features), "must be > 0 where no features are named")
            check("temperature", self.temperature > 0, "must be > 0")
            check("feature_weight", self.feature_weight > 0, "must be > 0")
            check("until_step", self.until_step is None or self.until_step >= 1, "optimizer steps, must be >= 1")

    @property
    def wanted(self) -> bool:
        """Whether there is a teacher."""
        return self.run is not None or self.path is not None
