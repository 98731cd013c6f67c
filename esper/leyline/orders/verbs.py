"""What can be ordered that is not a slot's: the one order to the whole run that a tick's commit carries."""

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from esper.leyline.breaker import BreakerPhase

LEVELS = ("off", "lifecycle", "full")  # of `log-level`, as in telemetry.level
PHASES = tuple(BreakerPhase)


class RunVerb(IntEnum):
    """Orders to the whole run; 0 is none."""

    NONE = 0
    PAUSE = 1
    RESUME = 2
    BREAKER = 3
    CHECKPOINT = 4
    STOP = 5
    LEVEL = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOrder:
    """One order to the whole run, as all ranks agree on it.

    Fields:
        verb: what to do.
        value: position in `PHASES` (BREAKER) or in `LEVELS` (LEVEL), or a tick (STOP; 0: as soon as it can).
        span: ticks that BREAKER's COOLING lasts.
        number: line of the order in the run's journal, from 1.
    """

    verb: RunVerb = RunVerb.NONE
    value: int = 0
    span: int = 0
    number: int = 0

    def __post_init__(self) -> None:
        most = {RunVerb.BREAKER: len(PHASES) - 1, RunVerb.LEVEL: len(LEVELS) - 1}.get(self.verb, 2**31)
        if not 0 <= self.value <= most or not 0 <= self.span <= 2**31:
            raise ValueError(f"{self.verb.name}: value {self.value}, span {self.span}; need 0 to {most}, 0 to 2^31")


NO_ORDER = RunOrder()


class Refusal(StrEnum):
    """Why an order did not come as far as a tick.

    FORGED: signed by another key, or for another run. STALE: too old, of the future, or for another attempt. REPLAYED:
    it has come before. MALFORMED: it cannot be read, or asks for what there is not. OUT_OF_ORDER: a later one of the
    same sender has come. OVERSIZED: too long. BUSY: too many are waiting. UNWRITTEN: the journal cannot be written.
    EXPIRED: no tick took it in time.
    """

    FORGED = "forged"
    STALE = "stale"
    REPLAYED = "replayed"
    MALFORMED = "malformed"
    OUT_OF_ORDER = "out of order"
    OVERSIZED = "oversized"
    BUSY = "busy"
    UNWRITTEN = "unwritten"
    EXPIRED = "expired"
