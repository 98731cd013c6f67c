"""The conditions of one slot that legality depends on, from its record alone: no gate's verdict, no other slot."""

from dataclasses import dataclass

from esper.accord.lifecycle import SlotState
from esper.accord.state import RunState, Terms
from esper.leyline.alpha import AlphaMode, Operator
from esper.leyline.observation import BlueprintInfo
from esper.leyline.stages import Stage


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
