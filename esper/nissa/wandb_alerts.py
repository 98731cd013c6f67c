"""What wandb tells people at once: the title says what kind of thing, the text what happened; never too often."""

import time
from collections.abc import Callable

from esper.leyline.breaker import BreakerPhase
from esper.leyline.events import (
    BirthVetoed,
    BreakerChanged,
    Event,
    Fault,
    FossilHurts,
    HealthAlert,
    OrdersRefused,
    Panic,
    PolicyAlarm,
    RolledBack,
    RunEnded,
    SlotDegraded,
    StepSkipped,
)

_GRAVE: dict[type[Event], str] = {Panic: "panic", RolledBack: "rollback", Fault: "fault"}
_WARNINGS: dict[type[Event], str] = {
    BirthVetoed: "birth vetoed",
    SlotDegraded: "seed runs by a fallback",
    StepSkipped: "steps skipped",
    FossilHurts: "fossil hurts",
    PolicyAlarm: "policy alarm",
    OrdersRefused: "orders refused",
}


def title_of(event: Event) -> tuple[str, str] | None:
    """Returns title and level (INFO, WARN, ERROR) of the alert for an event; None for an event without one."""
    for level, titles in (("ERROR", _GRAVE), ("WARN", _WARNINGS)):
        for kind, title in titles.items():
            if isinstance(event, kind):
                return title, level
    if isinstance(event, HealthAlert):
        return f"health: {event.ailment.value.replace('_', ' ')}", "WARN"
    if isinstance(event, BreakerChanged) and event.target is BreakerPhase.OPEN:
        return "growth stopped by its breaker", "ERROR"
    if isinstance(event, RunEnded) and event.status not in ("done", "preempted"):
        return f"run {event.status}", "ERROR"
    return None


class AlertLimit:
    """Lets through one alert per title and interval, and counts the others.

    Args:
        every_s: seconds between two alerts of one title.
        clock: seconds since any moment.

    Attributes:
        held_back: alerts that were not sent.
    """

    def __init__(self, every_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.held_back = 0
        self._every_s, self._clock = every_s, clock
        self._sent: dict[str, float] = {}
        self._waiting: dict[str, int] = {}

    def admit(self, title: str, text: str) -> str | None:
        """Returns the text to send, with how many of this title were held back since the last; None to send nothing."""
        now, last = self._clock(), self._sent.get(title)
        if last is not None and now - last < self._every_s:
            self._waiting[title] = self._waiting.get(title, 0) + 1
            self.held_back += 1
            return None
        self._sent[title] = now
        waiting = self._waiting.pop(title, 0)
        return f"{text} ({waiting} more since the last alert)" if waiting else text
