"""Builds observations from the agreed state, and reports for whoever drives many hosts in training (see
`esper.leyline.protocols.Trials`). Pure functions, the same on all ranks."""

from dataclasses import fields, replace
from typing import Any

from esper.accord.facts import conditions_of, harm_of, help_of, max_looks, running_of, verdict_ahead
from esper.accord.lifecycle import SlotState
from esper.accord.state import RunState, Terms
from esper.accord.verdict import Verdict
from esper.leyline.alpha import AlphaMode
from esper.leyline.evidence import ABSENT, NO_HEALTH, NO_WORTH, Reading, measured
from esper.leyline.observation import Observation, SlotObservation
from esper.leyline.protocols import Ending, Report
from esper.leyline.stages import Stage

_EMPTY: dict[str, Any] = {
    "stage": Stage.EMPTY,
    "staged": False,
    "blueprint": None,
    "operator": None,
    "curve": None,
    "alpha": 0.0,
    "alpha_target": 0.0,
    "alpha_velocity": 0.0,
    "ramp_progress": 0.0,
    "alpha_mode": AlphaMode.HOLD,
    "ending": False,
    "parameters": 0,
    "contribution": ABSENT,
    "contribution_alpha": 0.0,
    "worth": NO_WORTH,
    "running": ABSENT,
    "helps": None,
    "hurts": None,
    "level": None,
    "looks": 0,
    "max_looks": 0,
    "lasting": ABSENT,
    "continuations": 0,
    "gate_mean": ABSENT,
    "gate_std": ABSENT,
    "effective_alpha": ABSENT,
    "gradient_norm": ABSENT,
    "gradient_ratio": ABSENT,
    "gradient_parity": ABSENT,
    "update_parity": ABSENT,
    "health": NO_HEALTH,
    "nonfinite_steps": 0,
    "degraded": 0,
    "verdict": None,
}


def parity(slot: Reading, host: Reading) -> Reading:
    """Returns a newborn's RMS over the incumbent's; absent unless both were measured at the same tick."""
    if slot.value is None or slot.tick is None or slot.tick != host.tick or not host.value:
        return ABSENT
    return measured(slot.value / host.value, tick=slot.tick, n=min(slot.n, host.n))


def gradient_ratio(state: RunState, slot: SlotState) -> Reading:
    """Returns the seed's mean gradient norm over the host's; absent unless both were measured at the same tick."""
    return parity(slot.gradient_norm, state.host_norm)


def effective_alpha(state: RunState, slot: SlotState) -> Reading:
    """Returns alpha times the mean of g_eff, the average strength of a gated seed; absent if g_eff is not measured."""
    mean, alpha = slot.gate_mean, slot.alpha(state.step)
    if mean.value is None or mean.tick is None:
        return ABSENT
    return replace(mean, value=alpha * mean.value, se=None if mean.se is None else alpha * mean.se)


def observe_empty(state: RunState, slot: SlotState, terms: Terms) -> SlotObservation:
    """What `observe_slot` says of an empty slot, without weighing evidence that it does not have: most are empty."""
    row, col = terms.places[slot.slot]
    barred = state.governor.barred
    return SlotObservation(
        **_EMPTY,
        slot=slot.slot,
        row=row,
        col=col,
        dwell=state.tick - slot.since_tick,
        min_dwell=terms.gates.min_dwell,
        generation=slot.generation,
        operators=terms.operators[slot.slot],
        channel=terms.channels.get(slot.slot),
        max_continuations=terms.gates.continuations,
        embargo_left=max(0, barred[slot.slot] - state.tick) if slot.slot in barred else 0,
        catalogue=terms.catalogue[slot.slot],
    )


def observe_slot(state: RunState, slot: SlotState, terms: Terms) -> SlotObservation:
    """What a controller sees of one slot."""
    step, fresh = state.step, terms.gates.fresh_ticks
    conditions = conditions_of(state, slot, terms)
    ramp = slot.ramp if slot.stage.is_blended else None
    row, col = terms.places[slot.slot]
    helps, hurts = help_of(slot, terms), harm_of(slot, terms)
    return SlotObservation(
        **{entry.name: getattr(conditions, entry.name) for entry in fields(conditions)},
        slot=slot.slot,
        row=row,
        col=col,
        generation=slot.generation,
        channel=terms.channels.get(slot.slot),
        curve=slot.curve,
        alpha_velocity=conditions.alpha - slot.alpha(max(0, step - terms.tick_steps)) if ramp is not None else 0.0,
        parameters=0 if slot.blueprint is None else terms.info(slot.slot, slot.blueprint).parameters,
        contribution=slot.contribution.as_of(state.tick, fresh),
        contribution_alpha=slot.contribution_alpha,
        worth=slot.worth.as_of(state.tick, fresh),
        running=running_of(slot, terms),
        helps=None if helps is None else helps.support,
        hurts=None if hurts is None else hurts.support,
        level=slot.level if slot.stage.has_seed else None,
        looks=slot.drawn,
        lasting=_lasting_of(slot),
        continuations=slot.continued,
        max_continuations=terms.gates.continuations,
        max_looks=max_looks(slot.stage, terms),
        gate_mean=slot.gate_mean,
        gate_std=slot.gate_std,
        effective_alpha=effective_alpha(state, slot),
        gradient_norm=slot.gradient_norm.as_of(state.tick, fresh),
        gradient_ratio=gradient_ratio(state, slot).as_of(state.tick, fresh),
        gradient_parity=parity(slot.health.gradient_rms, state.host_health.gradient_rms).as_of(state.tick, fresh),
        update_parity=parity(slot.health.update_rms, slot.health.host_update_rms).as_of(state.tick, fresh),
        health=slot.health.as_of(state.tick, fresh),
        nonfinite_steps=slot.nonfinite_steps,
        verdict=verdict_ahead(state, slot, terms),
    )


def _lasting_of(slot: SlotState) -> Reading:
    found = slot.lasting
    return ABSENT if found is None else measured(found.lower, tick=found.tick, n=found.clusters)


def observation_of(state: RunState, terms: Terms) -> Observation:
    """Returns the observation of this state that every controller sees."""
    fresh = terms.gates.fresh_ticks
    return Observation(
        tick=state.tick,
        step=state.step,
        total_steps=terms.total_steps,
        remaining=max(0.0, 1.0 - state.step / terms.total_steps),
        train_loss=state.train_loss,
        train_accuracy=state.train_accuracy,
        validation_loss=state.validation_loss.as_of(state.tick, fresh),
        validation_accuracy=state.validation_accuracy.as_of(state.tick, fresh),
        together=state.together.as_of(state.tick, fresh),
        host_gradient_norm=state.host_norm,
        host_health=state.host_health.as_of(state.tick, fresh),
        host=terms.host,
        skipped_steps=state.skipped,
        budgets=terms.budgets(state),
        breaker=state.governor.breaker.view(state.tick),
        slots=tuple(
            [
                observe_slot(state, slot, terms) if slot.taken else observe_empty(state, slot, terms)
                for slot in state.slots
            ]
        ),
    )


def ending_of(state: RunState, *, budget: int, total_steps: int, max_consecutive: int) -> Ending:
    """Returns whether a trial is over at this tick, and why.

    A panic ends it, where a run would go back; so does a validation loss that is not finite.

    Args:
        state: the state with this tick's evidence absorbed and judged.
        budget: FLOPs of the task.
        total_steps: optimizer steps of the run.
        max_consecutive: skipped steps in a row that end a run.
    """
    sick = state.governor.verdict is Verdict.PANIC or not state.validation_loss.is_measured
    if sick or state.judged_row >= max_consecutive:
        return Ending.DIVERGED
    spent = (state.flops or 0) >= budget or state.step >= total_steps
    return Ending.SPENT if spent else Ending.RUNNING


def make_report(
    state: RunState,
    terms: Terms,
    *,
    budget: int,
    parameters: int,
    max_consecutive: int,
    births: int,
    prunes: int,
) -> Report:
    """Returns the report of a tick before its decision.

    Args:
        state: the state with this tick's evidence absorbed and judged.
        terms: terms of the run.
        budget: FLOPs of the task.
        parameters: of the bare host.
        max_consecutive: skipped steps in a row that end a run.
        births: births since the last report.
        prunes: seeds pruned since the last report.
    """
    flops = state.flops or 0
    seeds = sum(
        terms.info(entry.slot, str(entry.blueprint)).parameters for entry in state.slots if entry.stage.has_seed
    )
    return Report(
        observation=replace(observation_of(state, terms), remaining=max(0.0, 1.0 - flops / budget)),
        flops=flops,
        budget=budget,
        parameters=parameters + seeds,
        validation_loss=state.validation_loss,
        births=births,
        prunes=prunes,
        ending=ending_of(state, budget=budget, total_steps=terms.total_steps, max_consecutive=max_consecutive),
    )
