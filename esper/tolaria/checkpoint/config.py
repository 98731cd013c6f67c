"""Settings of checkpoints."""

from dataclasses import dataclass

from esper.leyline.fields import Checks


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every_ticks: int = 10
    """Ticks between saves; 0: only at a stop and at the end."""

    keep: int = 3
    """How many of the newest checkpoints are kept; the best one and the newest valid one are kept besides."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("every_ticks", self.every_ticks >= 0, "ticks, must be >= 0")
            check("keep", self.keep >= 1, "must be >= 1")
