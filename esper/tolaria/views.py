"""From agreed sums to agreed state, and from there to what a controller sees. Pure functions, same on all ranks."""

from collections.abc import Mapping
from dataclasses import replace

from esper.kasmina.gates import GateFacts, judge
from esper.kasmina.lifecycle import SlotState
from esper.leyline.evidence import ABSENT, GateResult, GradientHealth, Reading, measured, paired, spread
from esper.leyline.observation import Observation, SlotObservation
from esper.leyline.stages import Gate, Stage
from esper.tolaria.account import probe_flops, step_flops
from esper.tolaria.state import RunState, Terms

GATE_AHEAD: dict[Stage, Gate] = {
    Stage.GERMINATED: Gate.G1,
    Stage.TRAINING: Gate.G2,
    Stage.BLENDING: Gate.G3,
    Stage.HOLDING: Gate.G5,
}


def _mean(total: float, count: float, tick: int) -> Reading:
    return measured(total / count, tick=tick, n=int(count)) if count > 0 else ABSENT


def _health(sums: Mapping[str, float], prefix: str, before: GradientHealth, tick: int) -> GradientHealth:
    steps = sums[f"{prefix}health_steps"]
    vanishing, exploding = (_mean(sums[f"{prefix}{name}"], steps, tick) for name in ("vanishing", "exploding"))
    return GradientHealth(
        vanishing=vanishing if steps else before.vanishing, exploding=exploding if steps else before.exploding,
        nans=int(sums[f"{prefix}nans"]), infs=int(sums[f"{prefix}infs"]),
    )  # fmt: skip


def gradient_ratio(state: RunState, slot: SlotState) -> Reading:
    """Mean gradient norm of the seed over the host's in the same window; absent unless both were measured in it."""
    own, host = slot.gradient_norm, state.host_norm
    if own.value is None or own.tick is None or own.tick != host.tick or not host.value:
        return ABSENT
    return measured(own.value / host.value, tick=own.tick, n=min(own.n, host.n))


def _absorb_slot(state: SlotState, sums: Mapping[str, float], tick: int, terms: Terms) -> SlotState:
    def get(name: str) -> float:
        return sums[f"{state.slot}.{name}"]

    if not state.stage.has_seed:
        return state
    degraded = int(get("degraded"))
    norm = _mean(get("norm"), get("norm_steps"), tick)
    gated = int(get("gate_count")) if get("gate_nonfinite") == 0 else 0
    after = replace(
        state,
        finite=get("finite") == terms.world_size,
        owned=get("owned") == terms.world_size,
        degraded=degraded,
        degraded_tick=(state.degraded_tick or tick) if degraded else None,
        gradient_norm=norm if norm.is_measured else state.gradient_norm,
        health=_health(sums, f"{state.slot}.", state.health, tick),
        nonfinite_steps=int(get("nonfinite")),
        gate_mean=paired(gated, get("gate_sum"), get("gate_sum_sq"), tick=tick, min_samples=2),
        gate_std=spread(gated, get("gate_sum"), get("gate_sum_sq"), tick=tick),
    )
    if state.request is None:
        return after
    least = terms.gates.min_samples
    reading = paired(
        int(get("probe_count")), get("probe_sum"), get("probe_sum_sq"), total_cube=get("probe_sum_cube"), tick=tick,
        min_samples=least,
    )  # fmt: skip
    if get("probe_nonfinite") > 0:
        reading = ABSENT
    return replace(
        after,
        contribution=reading,
        contribution_alpha=state.request.alpha,
        spent=state.spent | {state.request.aim: state.request.look},
        request=None,
    )


def _flops(state: RunState, sums: Mapping[str, float], terms: Terms) -> int | None:
    """What was spent since the state's tick, on top of what it had spent."""
    if terms.costs is None:
        return None
    probed = {entry.slot: int(sums[f"{entry.slot}.probe_count"]) for entry in state.slots if entry.request is not None}
    spent = int(sums["train_samples"]) * step_flops(state.slots, terms.costs, terms.slots_config)
    return (state.flops or 0) + spent + probe_flops(state.slots, terms.costs, probed)


def absorb(state: RunState, sums: Mapping[str, float], terms: Terms, *, step: int, epoch: int) -> RunState:
    """The state with one tick's agreed sums taken in. A sum that lacks a term that was not finite is absent evidence.

    Args:
        state: as of the previous tick. sums: the reduced observe vector by name.
        terms: of the run. step, epoch: optimizer steps done and epochs begun, equal on all ranks.
    """
    tick = state.tick + 1
    count = sums["train_count"]
    validated = sums["validation_count"]
    validation_loss, validation_accuracy = state.validation_loss, state.validation_accuracy
    if validated > 0:
        n = int(validated)
        validation_loss = paired(n, sums["validation_loss"], sums["validation_loss_sq"], tick=tick, min_samples=2)
        validation_accuracy = paired(
            n, sums["validation_correct"], sums["validation_correct_sq"], tick=tick, min_samples=2
        )
        if sums["validation_nonfinite"] > 0:
            validation_loss = validation_accuracy = ABSENT
    row, longest = int(sums["skipped_in_row"]), int(sums["longest_row"])
    return replace(
        state,
        tick=tick,
        step=step,
        epoch=epoch,
        slots=tuple(_absorb_slot(entry, sums, tick, terms) for entry in state.slots),
        train_loss=_mean(sums["train_loss"], count, tick),
        train_accuracy=_mean(sums["train_correct"], count, tick),
        validation_loss=validation_loss,
        validation_accuracy=validation_accuracy,
        host_norm=_mean(sums["host_norm"], sums["host_norm_steps"], tick),
        host_health=_health(sums, "host_", state.host_health, tick),
        skipped=int(sums["skipped"]),
        skipped_in_row=row,
        judged_row=max(row, longest) if longest >= terms.max_skips else row,
        samples=state.samples + int(sums["train_samples"]),
        flops=_flops(state, sums, terms),
    )


def facts_of(state: RunState, slot: SlotState, terms: Terms, refusal: str | None = None) -> GateFacts:
    """What a gate may know of a slot."""
    fresh = terms.gates.fresh_ticks
    parameters = terms.info(slot.slot, slot.blueprint).parameters if slot.blueprint is not None else 0
    return GateFacts(
        stage=slot.stage,
        dwell=state.tick - slot.since_tick,
        finite=slot.finite,
        owned=slot.owned,
        degraded=slot.degraded,
        refusal=refusal,
        gradient_norm=slot.gradient_norm.aged(state.tick, fresh),
        health=slot.health.aged(state.tick, fresh),
        nonfinite_steps=slot.nonfinite_steps,
        trainable=parameters > 0,
        contribution=slot.contribution.aged(state.tick, fresh),
        contribution_alpha=slot.contribution_alpha,
        looks=slot.looks,
        max_looks=max_looks(slot.stage, terms),
        alpha=slot.alpha(state.step),
        ramp_done=slot.ramp_done(state.step),
    )


def verdict_ahead(state: RunState, slot: SlotState, terms: Terms) -> GateResult | None:
    """The gate on this slot's way forward, judged on present evidence; None where there is none."""
    gate = GATE_AHEAD.get(slot.stage)
    if gate is None or slot.ending:
        return None
    return judge(gate, facts_of(state, slot, terms), terms.gates)


def max_looks(stage: Stage, terms: Terms) -> int:
    """Scheduled looks a life in a stage, for each aim; 0 where nothing is measured."""
    if stage in (Stage.TRAINING, Stage.BLENDING):
        return terms.gates.looks
    return terms.gates.hold_looks if stage is Stage.HOLDING else 0


def embargo_left(slot: SlotState, tick: int, terms: Terms) -> int:
    """Ticks until a cooling slot is empty again; 0 when it is not cooling."""
    rest = {
        Stage.PRUNED: 1 + terms.slots_config.embargo_ticks + 1,
        Stage.EMBARGOED: terms.slots_config.embargo_ticks + 1,
    }
    rest[Stage.RESETTING] = 1
    return max(0, rest.get(slot.stage, 0) - (tick - slot.since_tick))


def effective_alpha(state: RunState, slot: SlotState) -> Reading:
    """alpha times the mean of g_eff: how strongly a gated seed is joined on average; absent where none is measured."""
    mean, alpha = slot.gate_mean, slot.alpha(state.step)
    if mean.value is None or mean.tick is None:
        return ABSENT
    return replace(mean, value=alpha * mean.value, se=None if mean.se is None else alpha * mean.se)


def _observe_slot(state: RunState, slot: SlotState, terms: Terms) -> SlotObservation:
    step, fresh = state.step, terms.gates.fresh_ticks
    ramp = slot.ramp if slot.stage.is_blended else None
    alpha = slot.alpha(step)
    row, col = terms.places[slot.slot]
    return SlotObservation(
        slot=slot.slot,
        row=row,
        col=col,
        stage=slot.stage,
        staged=slot.staged is not None,
        dwell=state.tick - slot.since_tick,
        min_dwell=terms.gates.min_dwell,
        generation=slot.generation,
        blueprint=slot.blueprint,
        operator=slot.operators(step)[0] if ramp is not None else slot.operator,
        operators=terms.operators[slot.slot],
        channel=terms.channels.get(slot.slot),
        curve=slot.curve,
        alpha=alpha,
        alpha_target=0.0 if ramp is None else ramp.target,
        alpha_velocity=alpha - slot.alpha(max(0, step - terms.tick_steps)) if ramp is not None else 0.0,
        ramp_progress=slot.ramp_progress(step),
        alpha_mode=slot.alpha_mode(step),
        ending=slot.ending,
        parameters=0 if slot.blueprint is None else terms.info(slot.slot, slot.blueprint).parameters,
        contribution=slot.contribution.aged(state.tick, fresh),
        contribution_alpha=slot.contribution_alpha,
        looks=slot.looks,
        max_looks=max_looks(slot.stage, terms),
        gate_mean=slot.gate_mean,
        gate_std=slot.gate_std,
        effective_alpha=effective_alpha(state, slot),
        gradient_norm=slot.gradient_norm.aged(state.tick, fresh),
        gradient_ratio=gradient_ratio(state, slot).aged(state.tick, fresh),
        health=slot.health.aged(state.tick, fresh),
        nonfinite_steps=slot.nonfinite_steps,
        degraded=slot.degraded,
        verdict=verdict_ahead(state, slot, terms),
        embargo_left=max(embargo_left(slot, state.tick, terms), state.governor.barred.get(slot.slot, 0) - state.tick),
        catalogue=terms.catalogue[slot.slot],
    )


def observe(state: RunState, terms: Terms) -> Observation:
    """What every controller sees of this state."""
    fresh = terms.gates.fresh_ticks
    return Observation(
        tick=state.tick,
        step=state.step,
        total_steps=terms.total_steps,
        remaining=max(0.0, 1.0 - state.step / terms.total_steps),
        train_loss=state.train_loss,
        train_accuracy=state.train_accuracy,
        validation_loss=state.validation_loss.aged(state.tick, fresh),
        validation_accuracy=state.validation_accuracy.aged(state.tick, fresh),
        host_gradient_norm=state.host_norm,
        host_health=state.host_health.aged(state.tick, fresh),
        skipped_steps=state.skipped,
        budgets=terms.budgets(state),
        breaker=state.governor.breaker.view(state.tick),
        slots=tuple(_observe_slot(state, slot, terms) for slot in state.slots),
    )
