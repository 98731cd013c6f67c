"""The circuit breaker of growth, which decides whether a seed may be born now.

    ALLOWED -- growth is blamed for a panic -> COOLING -- time is over -> TRIAL -- the seed on trial stands -> ALLOWED
    TRIAL   -- growth is blamed again -------> COOLING, for longer; OPEN after too many, until somebody overrides it

`esper.accord.breaker` moves it.
"""

from dataclasses import dataclass
from enum import StrEnum


class BreakerPhase(StrEnum):
    """Phases of the breaker.

    ALLOWED: births are not restricted. TRIAL: one seed at a time. COOLING: no birth for a time. OPEN: no birth until
    somebody overrides the breaker.
    """

    ALLOWED = "ALLOWED"
    TRIAL = "TRIAL"
    COOLING = "COOLING"
    OPEN = "OPEN"


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerView:
    """The part of the breaker's state that a controller sees.

    Fields:
        phase: see `BreakerPhase`.
        ticks_left: ticks until COOLING ends; 0 in any other phase.
        on_trial: slot of the seed on trial, or None.
    """

    phase: BreakerPhase = BreakerPhase.ALLOWED
    ticks_left: int = 0
    on_trial: str | None = None


def why_no_birth(view: BreakerView) -> str | None:
    """Returns the reason why the breaker refuses a germination, or None if it allows one."""
    if view.phase is BreakerPhase.COOLING:
        return f"breaker cooling, {view.ticks_left} ticks left"
    if view.phase is BreakerPhase.OPEN:
        return "breaker open: growth was blamed for too many panics; no birth for the rest of this run"
    if view.phase is BreakerPhase.TRIAL and view.on_trial is not None:
        return f"breaker on trial: the seed in {view.on_trial} must stand first"
    return None
