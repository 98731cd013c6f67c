"""The reducer case by case: staged births, quarantine, order within a tick."""

import pytest

from esper.accord.effects import Discard, Prepare, Register, Uproot, Veto
from esper.accord.facts import verdict_ahead
from esper.leyline.alpha import Curve
from esper.leyline.commands import Command
from esper.leyline.events import BirthVetoed, CommandJudged, CommandRefused, GateJudged, StageChanged
from esper.leyline.stages import Gate, Op, Stage
from tests.support.agreed_states import Run, ask, at, germinate, moves, refusals, run_of

# staged births ----------------------------------------------------------------------------------------------------


def test_a_birth_takes_two_ticks():
    run = run_of()
    command = germinate("r0c1", "heavy", ticks=4, target=0.5, curve=Curve.SIGMOID, steepness=3.0, proposal=7)
    run.tick(command)
    assert run.out.effects == [Prepare("r0c1", command, 1)]
    slot = run.slot("r0c1")
    assert (slot.stage, slot.staged, slot.staged_tick, slot.generation) == (Stage.EMPTY, command, 1, 0)
    assert (run.state.germinations, run.state.proposals, moves(run)) == (1, 7, [])
    assert slot.blueprint is None
    run.tick()
    assert run.out.effects == [Register("r0c1")]
    slot = run.slot("r0c1")
    assert (slot.stage, slot.staged, slot.generation, slot.since_tick) == (Stage.GERMINATED, None, 1, 2)
    assert (slot.blueprint, slot.tempo, slot.target, slot.curve, slot.steepness) == (
        "heavy",
        4,
        0.5,
        Curve.SIGMOID,
        3.0,
    )
    (change,) = run.events(StageChanged)
    assert (change.proposal, change.generation, change.blueprint, change.cause) == (7, 1, "heavy", "GERMINATE")


def test_the_reason_stays_on_rank_0():
    run = run_of()
    run.tick(germinate("r0c0", reason="a long story"))
    assert run.slot().staged.reason == ""
    assert run.out.effects[0].command.reason == ""


@pytest.mark.parametrize("veto", [Veto.BUILD_FAILED, Veto.OUT_OF_MEMORY, Veto.NONFINITE_AT_BIRTH])
def test_a_veto_discards_the_seed_everywhere_and_says_who_and_why(veto):
    run = run_of()
    run.tick(germinate("r0c0", proposal=3))
    run.tick(vetoes={"r0c0": (veto, 1)})
    assert run.out.effects == [Discard("r0c0")]
    (event,) = run.events(BirthVetoed)
    assert (event.slot, event.blueprint, event.rank, event.reason, event.proposal) == ("r0c0", "light", 1, veto.name, 3)
    assert event.priority
    slot = run.slot()
    assert (slot.stage, slot.staged, slot.generation, slot.blueprint) == (Stage.EMPTY, None, 0, None)
    assert run.state.germinations == 0, "a birth that did not come to pass is not paid for"
    run.tick(germinate("r0c0"))
    assert run.out.effects[0].generation == 1


def test_not_ready_keeps_it_staged_up_to_stage_ticks_and_then_discards_it():
    run = run_of(stage_ticks=3)
    run.tick(germinate("r0c0"))
    not_ready = {"r0c0": (Veto.NOT_READY, 1)}
    for _ in range(2):
        run.tick(vetoes=not_ready)
        assert run.out.effects == []
        assert run.slot().staged is not None
    run.tick(vetoes=not_ready)
    assert run.out.effects == [Discard("r0c0")]
    assert run.events(BirthVetoed)[0].reason == "NOT_READY after 3 ticks"


def test_a_late_seed_is_born_once_it_is_ready():
    run = run_of(stage_ticks=3)
    run.tick(germinate("r0c0"))
    run.tick(vetoes={"r0c0": (Veto.NOT_READY, 0)})
    run.tick()
    assert run.out.effects == [Register("r0c0")]
    assert run.slot().stage is Stage.GERMINATED


def test_a_staged_seed_that_is_ready_may_be_pruned_and_is_never_born():
    """What a controller sees as staged it may take back, ready or not: the command comes before the birth."""
    run = run_of()
    run.tick(germinate("r0c0"))
    run.tick(Command(slot="r0c0", op=Op.PRUNE, ticks=2))
    assert len(refusals(run)) == 1
    assert run.slot().stage is Stage.GERMINATED, "a prune by ramp is none, and holds up no birth"
    run = run_of()
    run.tick(germinate("r0c0"))
    run.tick(Command(slot="r0c0", op=Op.PRUNE, proposal=5))
    assert (refusals(run), run.out.effects) == ([], [Discard("r0c0")])
    slot = run.slot()
    assert (slot.stage, slot.staged, slot.proposal, moves(run)) == (Stage.EMPTY, None, 5, [])
    run = run_of()
    run.tick(germinate("r0c0"))
    run.tick(Command(slot="r0c0", op=Op.PRUNE), vetoes={"r0c0": (Veto.BUILD_FAILED, 1)})
    assert len(run.events(BirthVetoed)) == 1
    assert run.out.effects == [Discard("r0c0")], "once"


def test_a_staged_seed_may_be_pruned_before_it_is_born_and_takes_no_other_command():
    run = run_of(stage_ticks=9)
    run.tick(germinate("r0c0"))
    not_ready = {"r0c0": (Veto.NOT_READY, 1)}
    for command in (germinate("r0c0"), ask("r0c0", "ADVANCE"), ask("r0c0", "FOSSILIZE")):
        run.tick(command, vetoes=not_ready)
        assert refusals(run) in (["a germination is staged"], ["G0: legal: a germination is staged"])
        assert run.slot().staged is not None
    run.tick(ask("r0c0", "PRUNE", proposal=9), vetoes=not_ready)
    assert run.out.effects == [Discard("r0c0")]
    slot = run.slot()
    assert (slot.stage, slot.staged, slot.proposal, slot.generation) == (Stage.EMPTY, None, 9, 0)
    assert not slot.taken


def test_a_vetoed_slot_may_germinate_again_in_the_same_tick():
    run = run_of()
    run.tick(germinate("r0c0", "heavy"))
    run.tick(germinate("r0c0", "noop"), vetoes={"r0c0": (Veto.BUILD_FAILED, 0)})
    assert [type(effect) for effect in run.out.effects] == [Discard, Prepare]
    assert run.slot().staged.blueprint == "noop"


def test_a_command_for_a_slot_that_was_born_in_this_tick_is_refused():
    run = run_of()
    run.tick(germinate("r0c0"))
    run.tick(ask("r0c0", "ADVANCE"))
    assert refusals(run) == ["the slot changed in this tick"]
    assert run.slot().stage is Stage.GERMINATED


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ({"max_live": 1}, "budget of live seeds is spent"),
        ({"max_germinations": 1}, "budget of germinations is spent"),
        ({"max_parameters": 905}, "budget of parameters: light needs 10, 5 left"),
        ({"max_flops": 9050}, "budget of FLOPs: light needs 100, 50 left"),
    ],
)
def test_two_births_in_one_tick_share_the_budgets(terms, said):
    run = run_of(**terms)
    run.tick(germinate("r0c0", "heavy"), germinate("r0c1", "light"))
    assert run.slot("r0c0").staged is not None
    assert run.slot("r0c1").staged is None
    assert refusals(run) == [said]
    gates = [(e.slot, e.result.gate, e.result.passed) for e in run.events(GateJudged)]
    assert gates == [("r0c0", Gate.G0, True), ("r0c1", Gate.G0, False)]


def test_an_unknown_blueprint_is_refused_with_those_that_fit():
    run = run_of()
    run.tick(germinate("r0c0", "missing"))
    assert refusals(run) == ["unknown blueprint 'missing' for this slot; it takes heavy, light, noop"]
    assert run.out.effects == []


# quarantine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING])
def test_a_slot_whose_gradient_was_not_finite_is_pruned_and_no_other(stage):
    run = at(stage)
    run.tick(germinate("r0c1"), r0c0__nonfinite=1)
    assert moves(run) == [(stage.name, "QUARANTINE", "PRUNED")]
    assert run.out.effects[0] == Uproot("r0c0")
    assert run.slot("r0c1").staged is not None


def test_a_fossil_is_not_quarantined():
    run = at(Stage.FOSSILIZED)
    run.tick(r0c0__nonfinite=3, skipped_in_row=9, skipped=9)
    assert moves(run) == []
    assert run.slot().stage is Stage.FOSSILIZED


def two_blending() -> Run:
    """r0c0 began to blend first, r0c1 after it; r1c0 is in training."""
    run = at(Stage.HOLDING, "r0c0", run_of(3, max_skips=3))
    at(Stage.BLENDING, "r0c1", run)
    at(Stage.TRAINING, "r1c0", run)
    return run


@pytest.mark.parametrize(("row", "pruned"), [(0, []), (2, []), (3, ["r0c1"]), (7, ["r0c1"])])
def test_after_max_skips_in_a_row_the_newest_blending_seed_goes(row, pruned):
    run = two_blending()
    run.tick(skipped=row, skipped_in_row=row)
    assert [effect.slot for effect in run.out.effects] == pruned
    assert [event.cause for event in run.events(StageChanged)] == ["QUARANTINE"] * len(pruned)


def test_if_skips_go_on_the_next_newest_goes_and_never_an_incubating_seed():
    run = two_blending()
    for expected in (["r0c1"], ["r0c0"], []):
        run.tick(skipped=3, skipped_in_row=3)
        assert [effect.slot for effect in run.out.effects if isinstance(effect, Uproot)] == expected
    assert run.slot("r1c0").stage is Stage.TRAINING


# order and form ---------------------------------------------------------------------------------------------------


def test_commands_are_judged_row_major_whatever_the_order_they_come_in():
    run = run_of(3, max_live=2)
    run.tick(germinate("r1c0"), germinate("r0c1"), germinate("r0c0"))
    assert [effect.slot for effect in run.out.effects] == ["r0c0", "r0c1"]
    assert [event.command.slot for event in run.events(CommandRefused)] == ["r1c0"]


def test_proposals_are_remembered_by_the_highest():
    run = run_of()
    run.tick(germinate("r0c0", proposal=41), Command(slot="r0c1", op=ask("r0c1", "WAIT").op))
    run.tick(ask("r0c0", "WAIT"))
    assert run.state.proposals == 41
    assert run.slot().proposal == 41


def test_applied_commands_carry_their_reason_and_waiting_makes_no_event():
    run = run_of()
    run.tick(germinate("r0c0", reason="plateau"), ask("r0c1", "WAIT"))
    assert [(e.command.slot, e.reason) for e in run.events(CommandJudged)] == [("r0c0", "plateau")]
    assert run.tick() != []
    assert run.tick() == []


# seeds that run by a fallback --------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING])
def test_a_degraded_seed_passes_no_gate_under_any_policy_and_is_pruned_if_it_lasts(stage):
    run = at(stage, run=run_of(gates={"degraded_ticks": 2}))
    op = "FOSSILIZE" if stage is Stage.HOLDING else "ADVANCE"
    for _ in range(2):
        run.tick(ask("r0c0", op), r0c0__degraded=1)
        assert run.slot().stage is stage
        assert "runs by a fallback on 1 ranks" in refusals(run)[0]
        verdict = verdict_ahead(run.state, run.slot(), run.terms)
        assert not verdict.passed
        assert "as built" in verdict.reason
        assert run.slot().request is None, "no look is spent on what is not what was built"
    run.tick(r0c0__degraded=2)
    assert moves(run) == [(stage.name, "DEGRADED", "PRUNED")]
    assert run.out.effects == [Uproot("r0c0")]
    assert (run.slot().degraded, run.slot().degraded_tick, run.slot().frozen_step) == (0, None, None)


def test_a_degraded_seed_stands_still_and_goes_on_where_it_stood_once_it_runs_as_built():
    run = at(Stage.TRAINING, run=run_of(gates={"degraded_ticks": 5}), ticks=4, curve=Curve.LINEAR)
    run.tick(ask("r0c0", "ADVANCE"))
    run.tick()
    alphas = []
    for degraded in (0, 1, 1, 1, 0, 0, 0, 0):
        run.tick(ask("r0c0", "ADVANCE"), r0c0__degraded=degraded)
        path = {run.slot().alpha(run.state.step + ahead) for ahead in range(run.terms.tick_steps)}
        assert degraded == 0 or len(path) == 1, "between ticks too"
        alphas.append(run.slot().alpha(run.state.step))
    assert alphas == pytest.approx([0.5, 0.75, 0.75, 0.75, 0.75, 1.0, 1.0, 1.0])
    assert run.slot().stage is Stage.HOLDING


def test_a_fallback_that_comes_and_goes_is_not_one_that_lasts():
    run = at(Stage.HOLDING, run=run_of(gates={"degraded_ticks": 2}))
    for degraded in (1, 1, 0, 1, 1, 0, 1, 1):
        run.tick(r0c0__degraded=degraded)
        assert run.slot().stage is Stage.HOLDING
        assert (run.slot().degraded_tick is not None) == bool(degraded)


def test_a_degraded_seed_may_be_ramped_out_and_a_ramp_out_goes_on():
    run = at(Stage.HOLDING, run=run_of(gates={"degraded_ticks": 9}))
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.5), r0c0__degraded=1)
    assert "only PRUNE is legal" in refusals(run)[0]
    run.tick(ask("r0c0", "PRUNE", ticks=2, curve=Curve.LINEAR), r0c0__degraded=1)
    alphas = [run.slot().alpha(run.state.step)]
    for _ in range(2):
        run.tick(r0c0__degraded=1)
        alphas.append(run.slot().alpha(run.state.step))
    assert alphas == [1.0, 0.5, 0.0]
    assert moves(run) == [("BLENDING", "RAMP_END", "PRUNED")]


def test_a_degraded_fossil_stays():
    run = at(Stage.FOSSILIZED, run=run_of(gates={"degraded_ticks": 0}))
    for _ in range(3):
        run.tick(r0c0__degraded=1)
    assert (run.slot().stage, run.slot().degraded) == (Stage.FOSSILIZED, 1)


def test_a_fallback_in_one_slot_is_no_matter_of_another():
    run = at(Stage.TRAINING, run=run_of(gates={"degraded_ticks": 0}))
    at(Stage.TRAINING, "r0c1", run=run)
    run.tick(ask("r0c1", "ADVANCE"), r0c0__degraded=1)
    assert [run.slot(slot).stage for slot in ("r0c0", "r0c1")] == [Stage.PRUNED, Stage.BLENDING]
