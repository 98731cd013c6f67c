"""What gates and the law ask of one slot, read off its record: facts for a gate, conditions for legality, and the look
that is due.

Conditions need no gate's verdict and no other slot, so judging one command costs one slot. Evidence is requested at one
tick and measured for the next:

    TRAINING   at dwell first_look, first_look + look_every, ...: loss at alpha 1 against loss at 0
    BLENDING   if the ramp will be at rest by then, every look_every ticks: at the alpha at which it rests
    HOLDING    as in BLENDING

A seed that is looked at often enough passes any gate in the end. So looks are counted per life and aim, and their
number is bounded: neither a new ramp nor a second visit to a stage gives one back. Looks at a partial alpha serve no
gate and have a count of their own. Each look draws its own samples.
"""

from dataclasses import dataclass

from esper.accord.gates import GateFacts, judge_gate
from esper.accord.lifecycle import ProbeRequest, SlotState
from esper.accord.state import RunState, Terms
from esper.leyline.alpha import AlphaMode, Operator
from esper.leyline.evidence import GateResult
from esper.leyline.observation import BlueprintInfo
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """`esper.leyline.legality.SlotConditions` of one slot; fields as in `SlotObservation`."""

    stage: Stage
    staged: bool
    dwell: int
    min_dwell: int
    operator: Operator | None
    operators: tuple[Operator, ...]
    alpha: float
    alpha_target: float
    ramp_progress: float
    alpha_mode: AlphaMode
    ending: bool
    degraded: int
    embargo_left: int
    catalogue: tuple[BlueprintInfo, ...]


def embargo_left(slot: SlotState, tick: int, terms: Terms) -> int:
    """Returns the ticks until a cooling slot is empty again; 0 if it is not cooling."""
    rest = {
        Stage.PRUNED: 1 + terms.slots_config.embargo_ticks + 1,
        Stage.EMBARGOED: terms.slots_config.embargo_ticks + 1,
        Stage.RESETTING: 1,
    }
    return max(0, rest.get(slot.stage, 0) - (tick - slot.since_tick))


def conditions_of(state: RunState, slot: SlotState, terms: Terms) -> Conditions:
    """Returns the present conditions of one slot that legality depends on."""
    step = state.step
    ramp = slot.ramp if slot.stage.is_blended else None
    return Conditions(
        stage=slot.stage,
        staged=slot.staged is not None,
        dwell=state.tick - slot.since_tick,
        min_dwell=terms.gates.min_dwell,
        operator=slot.operators(step)[0] if ramp is not None else slot.operator,
        operators=terms.operators[slot.slot],
        alpha=slot.alpha(step),
        alpha_target=0.0 if ramp is None else ramp.target,
        ramp_progress=slot.ramp_progress(step),
        alpha_mode=slot.alpha_mode(step),
        ending=slot.ending,
        degraded=slot.degraded,
        embargo_left=max(embargo_left(slot, state.tick, terms), state.governor.barred.get(slot.slot, 0) - state.tick),
        catalogue=terms.catalogue[slot.slot],
    )


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
