"""The agreed record of orders to the whole run, and how an order changes it: pure functions of agreed data.

    pause       growth stands still: the controller is not asked, no seed is born, goes a stage on or gets a new target,
                and no look is drawn. What was begun ends by itself (ramps, staged births, cool-down), a seed can be
                pruned, quarantine and governor work as ever. Training goes on.
    checkpoint  a save after the next tick, stop: a save and the end after the next tick, or after a later one. Not
                after the tick that commits the order, since a save is prepared before a commit.

A rollback takes this record back with everything else, and the journal's orders are taken again at their own ticks. Not
those to the slots that it blames, and none to the breaker, which is not taken back: they are *barred*.
"""

from dataclasses import dataclass, replace

from esper.leyline.orders.verbs import LEVELS, RunOrder, RunVerb
from esper.leyline.stages import Op

BREAKER = "breaker"  # in `Barred.what`
_STANDING = (Op.WAIT, Op.PRUNE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Barred:
    """Orders of the journal that are not taken again.

    Fields:
        what: slot id, or `BREAKER`.
        first_tick: first tick of these orders.
        last_tick: their last tick.
        rollbacks: rollbacks of the run before it took them, at most.
    """

    what: str
    first_tick: int
    last_tick: int
    rollbacks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Steering:
    """What orders to the whole run have come to.

    Fields:
        paused: whether growth stands still.
        level: telemetry level that was ordered; "" leaves that of the settings.
        save_tick: tick after which a save was ordered; 0: none.
        stop_tick: tick after which the end was ordered; 0: none.
        rollbacks: rollbacks so far.
        barred: orders that are not taken again.
    """

    paused: bool = False
    level: str = ""
    save_tick: int = 0
    stop_tick: int = 0
    rollbacks: int = 0
    barred: tuple[Barred, ...] = ()

    def bars(self, what: str, tick: int, rollbacks: int) -> bool:
        """Whether an order of the journal is not taken again.

        Args:
            what: slot id or `BREAKER`; anything else is never barred.
            tick: at which it was taken.
            rollbacks: rollbacks of the run before that.
        """
        return any(
            bar.what == what and bar.first_tick <= tick <= bar.last_tick and rollbacks <= bar.rollbacks
            for bar in self.barred
        )

    def why_not(self, op: Op) -> str | None:
        """Why a command is refused while growth is paused, or None."""
        return "growth is paused by an order" if self.paused and op not in _STANDING else None


def after_order(steering: Steering, order: RunOrder, tick: int) -> Steering:
    """Returns the record after an order that was committed at ``tick``; one to the breaker changes nothing here."""
    if order.verb in (RunVerb.PAUSE, RunVerb.RESUME):
        return replace(steering, paused=order.verb is RunVerb.PAUSE)
    if order.verb is RunVerb.LEVEL:
        return replace(steering, level=LEVELS[order.value])
    if order.verb is RunVerb.CHECKPOINT:
        return replace(steering, save_tick=tick + 1)
    if order.verb is RunVerb.STOP:
        return replace(steering, stop_tick=max(tick + 1, order.value))
    return steering


def after_rollback(present: Steering, target: Steering, blamed: tuple[str, ...], first: int, last: int) -> Steering:
    """Returns the record with which a run goes on from a restored generation.

    Args:
        present: the record at the panic.
        target: the restored record.
        blamed: slots that are blamed.
        first: first tick after the restored state.
        last: tick of the panic.
    """
    bars = tuple(
        Barred(what=what, first_tick=first, last_tick=last, rollbacks=present.rollbacks) for what in (BREAKER, *blamed)
    )
    return replace(target, rollbacks=present.rollbacks + 1, barred=(*present.barred, *bars))
