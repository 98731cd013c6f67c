"""Events of a run's health: what rank 0 found odd in the figures of ticks. They decide nothing."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from esper.leyline.events.base import Event


class Ailment(StrEnum):
    """What is odd.

    THROUGHPUT: fewer samples a second than of late. DATA_WAIT: steps wait for data. STALL: one interval took far longer
    than usual. LOSS, GRADIENT: far out of line with the last ticks. STRAGGLER: one rank works far longer than the
    others, which wait for it. HOST_MEMORY, DEVICE_MEMORY: hardly any is left on a rank.
    """

    THROUGHPUT = "throughput"
    DATA_WAIT = "data_wait"
    STALL = "stall"
    LOSS = "loss"
    GRADIENT = "gradient"
    STRAGGLER = "straggler"
    HOST_MEMORY = "host_memory"
    DEVICE_MEMORY = "device_memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthAlert(Event):
    """Something is odd, and the run goes on. Said when it begins, and again only after it was over."""

    kind: ClassVar[str] = "health"
    priority: ClassVar[bool] = True
    ailment: Ailment
    """What is odd."""

    rank: int | None
    """The rank that it is about; None: all, or rank 0, which measured it."""

    value: float
    """What was measured, in the unit of ``limit``."""

    limit: float
    """The limit that it is beyond (``telemetry.health``)."""

    words: str
    """What was measured, in words."""

    look_at: str
    """What to look at."""

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"health, {self.ailment.value}: {self.words}; look at {self.look_at}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettled(Event):
    """After a seed was born, or began to blend, the training loss is where it had been before; or it has not come back
    in the time that was given it.
    """

    kind: ClassVar[str] = "settled"
    digits: ClassVar[int | None] = 7
    slot: str
    """Slot id, as r0c0."""

    blueprint: str
    """Blueprint of the seed."""

    after: str
    """``birth`` or ``blending``."""

    height: float
    """Highest training loss since then, less the mean of the ticks before; at or below 0: there was no spike."""

    recovery: int | None
    """Optimizer steps until it was back; None: it was not, within ``telemetry.health.settle_ticks``."""

    @property
    def line(self) -> str:
        """All of it in one line."""
        name = f"{self.slot} {self.blueprint}"
        if self.height <= 0:
            return f"{name}: the loss did not rise at its {self.after}"
        when = "is not back yet" if self.recovery is None else f"was back after {self.recovery} steps"
        return f"{name}: the loss rose by {self.height:.3g} at its {self.after}, {when}"
