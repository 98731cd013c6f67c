"""The line of a slot in the event of a tick. Most slots are empty, and for those nothing is worked out."""

from esper.accord.lifecycle import SlotState
from esper.accord.observation import effective_alpha, gradient_ratio, parity
from esper.accord.state import RunState
from esper.leyline.events import SlotLine
from esper.leyline.evidence import ABSENT, NO_HEALTH, NO_WORTH


def line_of(state: RunState, entry: SlotState) -> SlotLine:
    """The line of one slot of this state."""
    return SlotLine(
        slot=entry.slot,
        stage=entry.stage,
        alpha=0.0 if entry.ramp is None else entry.alpha(state.step),
        blueprint=entry.blueprint,
        effective_alpha=ABSENT if entry.gate_mean is ABSENT else effective_alpha(state, entry),
        gate_mean=entry.gate_mean,
        gate_std=entry.gate_std,
        contribution=entry.contribution,
        gradient_norm=entry.gradient_norm,
        gradient_ratio=ABSENT if entry.gradient_norm is ABSENT else gradient_ratio(state, entry),
        gradient_parity=ABSENT
        if entry.health is NO_HEALTH
        else parity(entry.health.gradient_rms, state.host_health.gradient_rms),
        update_parity=ABSENT
        if entry.health is NO_HEALTH
        else parity(entry.health.update_rms, entry.health.host_update_rms),
        health=entry.health,
        worth=entry.worth if entry.worth.shapley.tick == state.tick else NO_WORTH,
    )
