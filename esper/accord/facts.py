"""The facts of a slot that gates judge, from the agreed state."""

from esper.accord.gates import GateFacts, judge_gate
from esper.accord.lifecycle import SlotState
from esper.accord.state import RunState, Terms
from esper.leyline.evidence import GateResult
from esper.leyline.stages import Gate, Stage

GATE_AHEAD: dict[Stage, Gate] = {
    Stage.GERMINATED: Gate.G1,
    Stage.TRAINING: Gate.G2,
    Stage.BLENDING: Gate.G3,
    Stage.HOLDING: Gate.G5,
}


def facts_of(state: RunState, slot: SlotState, terms: Terms, refusal: str | None = None) -> GateFacts:
    """Returns the facts of a slot that a gate may judge."""
    fresh = terms.gates.fresh_ticks
    parameters = terms.info(slot.slot, slot.blueprint).parameters if slot.blueprint is not None else 0
    return GateFacts(
        stage=slot.stage,
        dwell=state.tick - slot.since_tick,
        finite=slot.finite,
        owned=slot.owned,
        degraded=slot.degraded,
        refusal=refusal,
        gradient_norm=slot.gradient_norm.as_of(state.tick, fresh),
        health=slot.health.as_of(state.tick, fresh),
        nonfinite_steps=slot.nonfinite_steps,
        trainable=parameters > 0,
        contribution=slot.contribution.as_of(state.tick, fresh),
        contribution_alpha=slot.contribution_alpha,
        looks=slot.looks,
        max_looks=max_looks(slot.stage, terms),
        alpha=slot.alpha(state.step),
        ramp_done=slot.ramp_done(state.step),
    )


def verdict_ahead(state: RunState, slot: SlotState, terms: Terms) -> GateResult | None:
    """Returns the verdict of the gate ahead of this slot on present evidence; None if there is no gate ahead."""
    gate = GATE_AHEAD.get(slot.stage)
    if gate is None or slot.ending:
        return None
    return judge_gate(gate, facts_of(state, slot, terms), terms.gates)


def max_looks(stage: Stage, terms: Terms) -> int:
    """Returns the number of scheduled looks of a life in this stage, for each aim; 0 if the stage has none."""
    if stage in (Stage.TRAINING, Stage.BLENDING):
        return terms.gates.looks
    return terms.gates.hold_looks if stage is Stage.HOLDING else 0
