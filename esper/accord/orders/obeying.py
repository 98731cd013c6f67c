"""Carries out an order to the whole run, as the reducer commits it."""

from dataclasses import replace

from esper.accord.breaker import after_order as turn_breaker
from esper.accord.changes import Changes
from esper.accord.orders.steering import after_order
from esper.leyline.events import BreakerChanged
from esper.leyline.orders.verbs import PHASES, RunOrder, RunVerb


def obey(changes: Changes, order: RunOrder) -> None:
    """Changes the agreed record as ordered; every order that is committed can be carried out."""
    state = changes.state
    if order.verb is RunVerb.NONE:
        return
    changes.outcome.state = replace(state, steering=after_order(state.steering, order, state.tick))
    if order.verb is RunVerb.BREAKER:
        why, old = f"order {order.number}", state.governor.breaker
        new = turn_breaker(old, PHASES[order.value], state.tick, order.span, why)
        changes.outcome.state = replace(changes.state, governor=replace(state.governor, breaker=new))
        left = new.view(state.tick).ticks_left
        changes.outcome.events.append(
            BreakerChanged(**changes.axes, source=old.phase, target=new.phase, ticks_left=left, reason=why, manual=True)
        )
