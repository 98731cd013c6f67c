"""The schedule of looks: evidence is requested at one tick and measured for the next.

    TRAINING   at dwell first_look, first_look + look_every, ...: loss at alpha 1 against loss at 0
    BLENDING   if the ramp will be at rest by then, every look_every ticks: at the alpha at which it rests
    HOLDING    as in BLENDING

A seed that is looked at often enough passes any gate in the end. So looks are counted per life and aim, and their
number is bounded: neither a new ramp nor a second visit to a stage gives one back. Looks at a partial alpha serve no
gate and have a count of their own. Each look draws its own samples.
"""

from esper.accord.facts import max_looks
from esper.accord.lifecycle import ProbeRequest, SlotState
from esper.accord.state import RunState, Terms
from esper.leyline.stages import Stage


def next_look(state: RunState, slot: SlotState, terms: Terms) -> ProbeRequest | None:
    """Returns the look to measure for the next tick, or None if none is due.

    Args:
        state: the agreed state after this tick's changes.
        slot: one of its records.
        terms: terms of the run.
    """
    aim = slot.aim
    if aim is None or slot.ending or slot.degraded or slot.looks >= max_looks(slot.stage, terms):
        return None
    alpha = _alpha_due(state, slot, terms)
    if alpha is None:
        return None
    look = slot.looks + 1
    return ProbeRequest(look=look, alpha=alpha, aim=aim, draw=f"{slot.generation}.{aim}.{look}")


def _alpha_due(state: RunState, slot: SlotState, terms: Terms) -> float | None:
    gates = terms.gates
    if slot.stage is Stage.TRAINING:
        since = state.tick + 1 - slot.since_tick - gates.first_look
        return 1.0 if since >= 0 and since % gates.look_every == 0 else None
    if slot.ramp is None or not slot.ramp_done(state.step + terms.tick_steps):
        return None
    last = slot.contribution.tick
    if last is not None and state.tick + 1 - last < gates.look_every:
        return None
    return slot.ramp.target
