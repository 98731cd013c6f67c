"""Operators and ramps in the agreed record: switches, gates that come and go, the edges of alpha."""

import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.accord.observation import observation_of
from esper.leyline.alpha import AlphaMode, Curve, Operator, Ramp
from esper.leyline.commands import Command
from esper.leyline.events import RampCommitted
from esper.leyline.plain import from_plain, to_plain
from esper.leyline.stages import Stage
from tests.support.agreed_states import Run, ask, at, germinate, moves, refusals, run_of

ADD, MULTIPLY, GATE, CONFIDENCE, CHANNEL = Operator


def partial(operator: Operator, target: float = 0.5) -> Run:
    """A seed at rest in BLENDING at a partial target."""
    run = at(Stage.BLENDING, operator=operator, target=target)
    assert run.slot().alpha(run.state.step) == target
    return run


def go_on(run: Run) -> None:
    """To the end of the ramp."""
    while not run.slot().ramp_done(run.state.step):
        run.tick()


# switching ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", Operator)
def test_from_alpha_0_there_is_nothing_to_fade(operator: Operator) -> None:
    run = run_of()
    run.tick(germinate("r0c0", operator=operator))
    for command in ((), (ask("r0c0", "ADVANCE"),), (ask("r0c0", "ADVANCE"),)):
        run.tick(*command)
    ramp = run.slot().ramp
    assert (ramp.operator, ramp.fades_from, ramp.start) == (operator, None, 0.0)
    assert run.slot().operators(run.state.step) == (operator, None)
    event = run.events(RampCommitted)[0]
    assert (event.operator, event.fades_from) == (operator.name, None)


@pytest.mark.parametrize("new", Operator)
@pytest.mark.parametrize("old", Operator)
def test_above_0_a_switch_is_a_cross_fade_along_its_ramp(old: Operator, new: Operator) -> None:
    run = partial(old)
    step = run.state.step + run.terms.tick_steps
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.8, ticks=2, operator=new, curve=Curve.LINEAR))
    assert refusals(run) == []
    fades = None if old is new else old
    slot = run.slot()
    assert (slot.ramp.operator, slot.ramp.fades_from, slot.operator) == (new, fades, new)
    assert run.events(RampCommitted)[0].fades_from == (None if fades is None else fades.name)
    shares = [slot.fade(at_step) for at_step in (step, step + 5, step + 10, step + 20)]
    assert shares == ([1.0] * 4 if fades is None else [0.0, 0.25, 0.5, 1.0])
    assert slot.operators(step) == slot.operators(step + 19) == (new, fades)
    assert slot.operators(step + 20) == (new, None)


def test_a_switch_without_a_ramp_would_jump_and_is_refused() -> None:
    run = partial(ADD)
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.5, ticks=0, operator=MULTIPLY))
    assert refusals(run) == ["a switch of the operator at alpha 0.5 would jump: it needs a ramp of at least 1 tick"]
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.7, ticks=0))
    assert refusals(run) == []
    down = partial(ADD)
    down.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.0, ticks=0))
    down.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.0, ticks=0, operator=MULTIPLY))
    assert refusals(down) == [], "at alpha 0 there is nothing that could jump"
    assert down.slot().operator is MULTIPLY


@pytest.mark.parametrize("op", ["GERMINATE", "SET_ALPHA_TARGET"])
@pytest.mark.parametrize(
    ("operator", "needs"),
    [(CONFIDENCE, r"class logits \[B, K >= 2\]"), (CHANNEL, "a vector v of the slot's width: set slots.channels")],
)
def test_an_operator_that_a_slot_may_not_use_is_refused_with_what_it_needs(
    operator: Operator, needs: str, op: str
) -> None:
    usable = dict.fromkeys(("r0c0", "r0c1"), (ADD, MULTIPLY, GATE))
    run = run_of(operators=usable) if op == "GERMINATE" else at(Stage.BLENDING, run=run_of(operators=usable))
    more = {"blueprint": "light"} if op == "GERMINATE" else {}
    run.tick(ask("r0c0", op, operator=operator, ticks=2, **more))
    (reason,) = refusals(run)
    assert reason.startswith(f"operator {operator.name} needs ")
    assert reason.endswith("this slot may use ADD, MULTIPLY, GATE")
    assert re.search(needs, reason)


# gates --------------------------------------------------------------------------------------------------------------


def gates_of(run: Run, ticks: int) -> list[bool]:
    found = []
    for _ in range(ticks):
        run.tick()
        found.append(run.slot().wants_gate(run.state.step))
    return found


def test_a_gate_lives_from_the_first_step_of_its_ramp_to_full_alpha() -> None:
    run = run_of()
    run.tick(germinate("r0c0", operator=GATE, ticks=3))
    assert gates_of(run, 1) == [False]
    run.tick(ask("r0c0", "ADVANCE"))
    assert not run.slot().wants_gate(run.state.step)
    assert run.slot().operators(run.state.step) == (ADD, None), "a TRAINING seed learns for full alpha"
    run.tick(ask("r0c0", "ADVANCE"))
    assert run.slot().wants_gate(run.state.step)
    assert gates_of(run, 4) == [True, True, False, False]
    assert run.slot().stage is Stage.BLENDING
    assert run.slot().ramp.operator is GATE
    run.tick(ask("r0c0", "ADVANCE"))
    slot = run.slot()
    assert (slot.stage, slot.operator, slot.ramp.operator, slot.ramp.fades_from) == (Stage.HOLDING, ADD, ADD, None)
    assert observation_of(run.state, run.terms).slot("r0c0").operator is ADD


@pytest.mark.parametrize("operator", Operator)
def test_from_holding_on_a_gated_operator_is_on_record_as_add(operator: Operator) -> None:
    run = at(Stage.FOSSILIZED, operator=operator)
    wanted = ADD if operator.is_gated else operator
    assert (run.slot().operator, run.slot().ramp.operator) == (wanted, wanted)
    assert run.slot().operators(run.state.step) == (wanted, None)


def test_a_partial_target_keeps_its_gate_and_a_new_ramp_keeps_it_too() -> None:
    run = partial(GATE)
    assert gates_of(run, 3) == [True] * 3
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.7, ticks=1, operator=GATE))
    assert run.slot().ramp.fades_from is None
    assert gates_of(run, 2) == [True] * 2


def test_a_gate_that_is_faded_out_leaves_at_the_ramp_s_end() -> None:
    run = partial(GATE)
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.5, ticks=2, operator=ADD))
    assert run.slot().wants_gate(run.state.step)
    assert gates_of(run, 2) == [True, False]


def test_from_holding_a_gate_comes_with_the_way_down_and_never_for_full_alpha() -> None:
    run = at(Stage.HOLDING)
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=1.0, ticks=2, operator=GATE))
    assert (run.slot().stage, run.slot().operator, run.slot().ramp.fades_from) == (Stage.HOLDING, ADD, None)
    go_on(run)
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.5, ticks=2, operator=GATE))
    slot = run.slot()
    assert (slot.stage, slot.ramp.operator, slot.ramp.fades_from) == (Stage.BLENDING, GATE, ADD)
    assert slot.wants_gate(run.state.step)


@pytest.mark.parametrize("operator", Operator)
def test_a_prune_keeps_the_operator_whatever_it_names(operator: Operator) -> None:
    run = partial(operator)
    run.tick(ask("r0c0", "PRUNE", ticks=2, operator=MULTIPLY))
    slot = run.slot()
    assert (slot.ending, slot.ramp.operator, slot.ramp.fades_from) == (True, operator, None)
    assert slot.wants_gate(run.state.step) == (operator is GATE), "frozen, and part of what the output is"
    run.tick()
    run.tick()
    assert moves(run) == [("BLENDING", "RAMP_END", "PRUNED")]
    assert not run.slot().wants_gate(run.state.step)


def test_a_prune_at_once_takes_the_gate_along() -> None:
    run = run_of()
    run.tick(germinate("r0c0", operator=GATE, ticks=3))
    for command in ((), (ask("r0c0", "ADVANCE"),), (ask("r0c0", "ADVANCE"),), ()):
        run.tick(*command)
    assert run.slot().wants_gate(run.state.step)
    assert run.slot().alpha_mode(run.state.step) is AlphaMode.UP
    run.tick(ask("r0c0", "PRUNE"))
    assert moves(run) == [("BLENDING", "PRUNE", "PRUNED")]
    assert not run.slot().wants_gate(run.state.step)


# what is observed ---------------------------------------------------------------------------------------------------


def test_gate_statistics_are_the_agreed_sums_and_effective_alpha_is_alpha_times_their_mean() -> None:
    run = partial(GATE)
    g = [0.25, 0.5, 0.75, 1.0]
    sums = {"gate_count": 4, "gate_sum": sum(g), "gate_sum_sq": sum(x * x for x in g)}
    run.tick(**{f"r0c0__{key}": value for key, value in sums.items()})
    view = observation_of(run.state, run.terms).slot("r0c0")
    assert (view.gate_mean.value, view.gate_mean.n, view.gate_mean.tick) == (0.625, 4, run.state.tick)
    deviation = math.sqrt(sum((x - 0.625) ** 2 for x in g) / 3)
    assert view.gate_std.value == pytest.approx(deviation)
    assert view.gate_mean.se == pytest.approx(deviation / 2)
    assert view.effective_alpha.value == pytest.approx(0.5 * 0.625)
    assert view.effective_alpha.se == pytest.approx(0.5 * deviation / 2)
    run.tick(**{f"r0c0__{key}": value for key, value in sums.items()}, r0c0__gate_nonfinite=1)
    mean = observation_of(run.state, run.terms).slot("r0c0").gate_mean
    assert mean.value is None, "a sum that lacks a term is no evidence"
    run.tick()
    assert observation_of(run.state, run.terms).slot("r0c0").effective_alpha.value is None


# the edges of alpha -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curve", Curve)
@pytest.mark.parametrize("ticks", [0, 1])
def test_ramps_of_no_step_and_of_one(ticks: int, curve: Curve) -> None:
    run = run_of(tick_steps=1)
    at(Stage.BLENDING, run=run, ticks=ticks, curve=curve)
    step = run.slot().ramp.first_step
    assert run.slot().ramp.last_step == step + ticks
    assert [run.slot().alpha(step + ahead) for ahead in (0, 1, 2)] == [0.0 if ticks else 1.0, 1.0, 1.0]
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.25, ticks=ticks, curve=curve))
    step = run.state.step
    assert [run.slot().alpha(step + ahead) for ahead in (0, 1, 2)] == [1.0 if ticks else 0.25, 0.25, 0.25]


@given(alpha=st.floats(0.0, 1.0), ticks=st.integers(0, 3), curve=st.sampled_from(Curve), k=st.floats(0.01, 50.0))
@settings(max_examples=25, deadline=None)
def test_a_target_that_is_the_present_alpha_moves_nothing(alpha: float, ticks: int, curve: Curve, k: float) -> None:
    run = partial(ADD, alpha)
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=alpha, ticks=ticks, curve=curve, steepness=k))
    assert refusals(run) == []
    path = [run.slot().alpha(run.state.step + ahead) for ahead in range(10 * ticks + 3)]
    assert set(path) == {alpha}


def test_mid_ramp_a_retarget_is_refused_and_only_a_prune_at_once_is_not() -> None:
    run = partial(ADD)
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=1.0, ticks=4))
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.2, ticks=1))
    assert refusals(run)[0].startswith("a ramp is under way")
    run.tick(ask("r0c0", "PRUNE", ticks=2))
    assert refusals(run) == ["a ramp is under way; only PRUNE now interrupts it"]
    before = run.slot().alpha(run.state.step)
    assert 0.5 < before < 1.0
    run.tick(ask("r0c0", "PRUNE"))
    assert refusals(run) == []
    assert run.slot().alpha(run.state.step) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -0.01, 1.0000001, 2.0])
def test_targets_outside_of_0_to_1_are_refused_at_birth_and_later(bad: float) -> None:
    run = run_of()
    run.tick(germinate("r0c0", target=bad))
    assert refusals(run) == [f"alpha target {bad!r}: need 0 to 1"]
    assert not run.slot().taken
    run = partial(ADD)
    path = run.slot().ramp
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=bad, ticks=1))
    assert refusals(run) == [f"alpha target {bad!r}: need 0 to 1"]
    assert run.slot().ramp == path


RAMP = Ramp(
    start=0.5, target=1.0, first_step=3, last_step=9, curve=Curve.SIGMOID, steepness=4.0, operator=GATE, fades_from=ADD
)
COMMAND = Command(slot="r0c0", op=ask("r0c0", "PRUNE").op, operator=CHANNEL, curve=Curve.LINEAR, ticks=3, proposal=7)


@pytest.mark.parametrize("value", [RAMP, replace(RAMP, fades_from=None), COMMAND])
def test_ramps_and_commands_survive_plain_data_strictly(value: Ramp | Command) -> None:
    plain = to_plain(value)
    assert from_plain(type(value), plain) == value
    assert plain["operator"] == value.operator.name, "by name, so that a reordered enum changes no file"
    for name in plain:
        rest = {key: item for key, item in plain.items() if key != name}
        with pytest.raises(ValueError, match=f"missing {name}$"):
            from_plain(type(value), rest)
        with pytest.raises(ValueError, match=f"missing {name}; unknown tempo"):
            from_plain(type(value), {**rest, "tempo": 1})
    with pytest.raises(ValueError, match="operator: 'BLEND' is none of ADD, MULTIPLY, GATE, CONFIDENCE, CHANNEL"):
        from_plain(type(value), {**plain, "operator": "BLEND"})


def test_a_ramp_fades_from_another_operator_or_from_none() -> None:
    with pytest.raises(ValueError, match=r"ramp\.fades_from = GATE: that is its operator"):
        replace(RAMP, fades_from=GATE)
    with pytest.raises(ValueError, match=r"ramp\.target"):
        from_plain(Ramp, {**to_plain(RAMP), "target": math.nan})
