"""Absorbs a tick's agreed sums into the agreed state. Pure functions, the same on all ranks."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import replace

from esper.accord.account import (
    birth_flops,
    moved_lately,
    probe_flops,
    step_flops,
    validation_flops,
)
from esper.accord.evidence.continuing import steps_due
from esper.accord.evidence.lasting import COPIES, SPENT, judge_lasting, marks_of
from esper.accord.evidence.sums import ClusterSums, reading_of
from esper.accord.lifecycle import ProbeRequest, SlotState
from esper.accord.state import RunState, Terms
from esper.leyline.evidence import (
    ABSENT,
    EXACT_SEEDS,
    WORTH_PAIRS,
    GradientHealth,
    Reading,
    SeedWorth,
    estimate_deviation,
    estimate_mean,
    measured,
)

HOST_PREFIX = "host_"


def _mean(total: float, count: float, tick: int) -> Reading:
    return measured(total / count, tick=tick, n=int(count)) if count > 0 else ABSENT


def _train_loss(sums: Mapping[str, float], tick: int) -> Reading:
    """The mean training loss. Without two samples, or if squares went beyond float64, it has no standard error."""
    count, total, squares = sums["train_count"], sums["train_loss"], sums["train_loss_sq"]
    if count < 2 or squares * count < total * total * (1 - 1e-6):
        return _mean(total, count, tick)
    return estimate_mean(int(count), total, squares, tick=tick, min_samples=2)


def _health(sums: Mapping[str, float], prefix: str, before: GradientHealth, tick: int) -> GradientHealth:
    steps = sums[f"{prefix}health_steps"]
    vanishing, exploding = (_mean(sums[f"{prefix}{name}"], steps, tick) for name in ("vanishing", "exploding"))
    moved = _mean(sums[f"{prefix}moved"], sums[f"{prefix}moved_steps"], tick)
    gradient = _mean(sums[f"{prefix}norm"], sums[f"{prefix}norm_steps"], tick)
    numbers = sums[f"{prefix}numbers"] / steps if steps else 0.0
    if gradient.value is not None:
        gradient = replace(gradient, value=gradient.value / math.sqrt(numbers)) if numbers else ABSENT
    update, beside = before.update_rms, before.host_update_rms
    if prefix != HOST_PREFIX and sums[f"{prefix}update_steps"]:  # the host's own record must not depend on its seeds
        update, beside = (
            _mean(sums[f"{of}update_rms"], sums[f"{of}update_steps"], tick) for of in (prefix, HOST_PREFIX)
        )
    return GradientHealth(
        vanishing=vanishing if steps else before.vanishing,
        exploding=exploding if steps else before.exploding,
        nans=int(sums[f"{prefix}nans"]),
        infs=int(sums[f"{prefix}infs"]),
        moved=moved if moved.is_measured else before.moved,
        gradient_rms=gradient if gradient.is_measured else before.gradient_rms,
        update_rms=update,
        host_update_rms=beside,
    )


def _absorb_slot(state: SlotState, sums: Mapping[str, float], tick: int, terms: Terms) -> SlotState:
    def get(name: str) -> float:
        return sums[f"{state.slot}.{name}"]

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
        gate_mean=estimate_mean(gated, get("gate_sum"), get("gate_sum_sq"), tick=tick, min_samples=2),
        gate_std=estimate_deviation(gated, get("gate_sum"), get("gate_sum_sq"), tick=tick),
    )
    if state.request is None:
        return after
    return _absorb_look(after, state.request, sums, tick, terms)


def _absorb_look(
    state: SlotState, request: ProbeRequest, sums: Mapping[str, float], tick: int, terms: Terms
) -> SlotState:
    """Returns the slot after its look: a reading of this look alone, and if it counts, the running evidence with it."""
    look = ClusterSums.read(sums, f"{state.slot}.probe_")
    left_out = int(sums[f"{state.slot}.probe_left_out"])
    beyond = sums[f"{state.slot}.probe_nonfinite"] > 0  # sums that went beyond float64
    void = beyond or left_out > terms.gates.max_left_out * (look.count + left_out)
    evidence = state.evidence if request.counts else None
    if evidence is not None:
        evidence = replace(evidence, void=evidence.void + 1) if void else evidence.add(look, tick)
    drawn = state.drawn if request.refill else max(state.drawn, request.look)
    return replace(
        state,
        left_out=state.left_out + left_out,
        void_looks=state.void_looks + int(void),
        looked_tick=tick,
        contribution=ABSENT if void else reading_of(look, tick=tick, min_samples=terms.gates.min_samples),
        contribution_alpha=request.alpha,
        evidence=evidence or state.evidence,
        drawn=drawn,
        refilled=request.look if request.refill else state.refilled,
        retold=state.retold + int(drawn == state.drawn and not request.refill),
        request=None,
    )


def _worth_of(sums: Mapping[str, float], name: str, tick: int, terms: Terms) -> Reading:
    """One quantity's mean and error from its sums; absent if a term was not finite."""
    n, owner = int(sums["worth_count"]), name.rpartition("worth_")[0]
    if sums[f"{owner}worth_nonfinite"] > 0:
        return ABSENT
    least = terms.gates.min_samples
    return estimate_mean(n, sums[name], sums[f"{name}_sq"], tick=tick, min_samples=least)


def _absorb_worth(state: SlotState, sums: Mapping[str, float], tick: int, terms: Terms, *, drawn: bool) -> SlotState:
    """The slot with what its seed is worth, if that was measured; errors cover drawn orders, if there were any."""
    if not state.stage.is_blended:
        return state
    solo, without, shapley = (
        _worth_of(sums, f"{state.slot}.worth_{name}", tick, terms) for name in ("solo", "without", "shapley")
    )
    if drawn and shapley.se is not None:
        pairs = [sums[f"{state.slot}.worth_pair{k}"] / sums["worth_count"] for k in range(WORTH_PAIRS)]
        shapley = replace(shapley, se=math.hypot(shapley.se, statistics.stdev(pairs) / math.sqrt(WORTH_PAIRS)))
    return replace(state, worth=SeedWorth(solo=solo, leave_one_out=without, shapley=shapley))


def _absorb_continuation(before: RunState, state: RunState, sums: Mapping[str, float], terms: Terms) -> RunState:
    """Returns the state after a piece of the continuation that is under way, if there is one; with its verdict after
    the last piece."""
    asked, under_way, gates = before.continued_slot(), before.continuing, terms.gates
    state = replace(state, continuing=None)
    if asked is None or under_way is None:
        return state
    own = {name.removeprefix("continued_"): value for name, value in sums.items() if name.startswith("continued_")}
    done, step = steps_due(under_way, gates), state.step if under_way.step is None else under_way.step
    if own["nonfinite"] == 0 and done < COPIES * gates.continue_steps:
        return replace(state, continuing=replace(under_way, step=step, done=done))
    first, last = marks = marks_of(gates.continue_steps)
    ahead = min(terms.total_steps - step, last + int(gates.continue_spans * (last - first)))
    void = own["nonfinite"] > 0 or own["left_out"] > gates.max_left_out * (own["count"] + own["left_out"])
    lasting = None
    if not void:
        lasting = judge_lasting(
            own,
            tick=state.tick,
            step=step,
            total=terms.total_steps,
            marks=marks,
            ahead=ahead,
            se=gates.continue_se,
        )
    entry = replace(state.slot(asked.slot), lasting=lasting, continued=asked.continued + 1)
    return state.with_slots({asked.slot: entry})


def _flops(state: RunState, sums: Mapping[str, float], terms: Terms, step: int) -> int | None:
    """The FLOPs spent up to this tick: the state's total plus those spent since."""
    if terms.costs is None:
        return None
    counts = {
        entry.slot: int(sums[f"{entry.slot}.probe_count"] + sums[f"{entry.slot}.probe_left_out"])
        for entry in state.slots
        if entry.request is not None
    }
    training = int(sums["train_samples"]) * step_flops(state.slots, terms.costs, terms.slots_config)
    births = birth_flops(state.slots, terms.costs, terms.gates.probe_samples * terms.world_size, state.tick)
    evidence = births + probe_flops(state.slots, terms.costs, counts)
    if sums["validation_count"] and moved_lately(state.slots, state.tick, step, terms.tick_steps):
        evidence += validation_flops(state.slots, terms.costs)
    evidence += round(sums.get("worth_flops", 0.0))
    under_way = state.continuing
    if state.continued_slot() is not None and under_way is not None and under_way.costs is not None:
        spent = zip(SPENT, under_way.costs, strict=True)
        evidence += sum(int(sums[f"continued_{name}"]) * cost for name, cost in spent)
    return (state.flops or 0) + training + evidence


def absorb(state: RunState, sums: Mapping[str, float], terms: Terms, *, step: int, epoch: int) -> RunState:
    """Returns the state after absorbing one tick's agreed sums.

    If a term was not finite and so was left out of a sum, the evidence from that sum is absent. Probe samples are left
    out one by one; if they are too many, the evidence is absent too.

    Args:
        state: the state as of the previous tick.
        sums: the reduced observe vector by name.
        terms: terms of the run.
        step: optimizer steps done, equal on all ranks.
        epoch: epochs begun, equal on all ranks.
    """
    tick = state.tick + 1
    count = sums["train_count"]
    validated = sums["validation_count"]
    validation_loss, validation_accuracy = state.validation_loss, state.validation_accuracy
    if validated > 0:
        n = int(validated)
        validation_loss = estimate_mean(
            n, sums["validation_loss"], sums["validation_loss_sq"], tick=tick, min_samples=2
        )
        validation_accuracy = estimate_mean(
            n, sums["validation_correct"], sums["validation_correct_sq"], tick=tick, min_samples=2
        )
        if sums["validation_nonfinite"] > 0:
            validation_loss = validation_accuracy = ABSENT
    row, longest = int(sums["skipped_in_row"]), int(sums["longest_row"])
    slots = [_absorb_slot(entry, sums, tick, terms) if entry.stage.has_seed else entry for entry in state.slots]
    drawn = sum([entry.stage.is_blended for entry in state.slots]) > EXACT_SEEDS
    if sums.get("worth_count"):
        slots = [_absorb_worth(entry, sums, tick, terms, drawn=drawn) for entry in slots]
    after = replace(
        state,
        tick=tick,
        step=step,
        epoch=epoch,
        slots=tuple(slots),
        train_loss=_train_loss(sums, tick),
        train_accuracy=_mean(sums["train_correct"], count, tick),
        validation_loss=validation_loss,
        validation_accuracy=validation_accuracy,
        together=_worth_of(sums, "worth_together", tick, terms) if sums.get("worth_count") else state.together,
        host_norm=_mean(sums["host_norm"], sums["host_norm_steps"], tick),
        host_health=_health(sums, HOST_PREFIX, state.host_health, tick),
        skipped=int(sums["skipped"]),
        skipped_in_row=row,
        judged_row=max(row, longest) if longest >= terms.max_skips else row,
        samples=state.samples + int(sums["train_samples"]),
        flops=_flops(state, sums, terms, step),
    )
    return _absorb_continuation(state, after, sums, terms)
