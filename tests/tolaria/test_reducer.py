"""The reducer case by case: staged births, quarantine, what advances by itself, partial targets, looks, cool-down."""

import pytest

from esper.kasmina.config import EvidencePolicy, Incubation
from esper.kasmina.lifecycle import ProbeRequest
from esper.leyline.alpha import AlphaMode, Curve
from esper.leyline.commands import Command
from esper.leyline.events import (
    BirthVetoed,
    CommandJudged,
    CommandRefused,
    GateJudged,
    RampCommitted,
    StageChanged,
)
from esper.leyline.stages import Gate, Stage
from esper.tolaria.reducer import Discard, Prepare, Register, Uproot
from esper.tolaria.wire import Veto
from tests.support.agreed import Run, ask, germinate, make_terms

GOOD, BAD, NONE = (100, 50.0, 26.0), (100, -50.0, 26.0), (0, 0.0, 0.0)


def run_of(slots: int = 2, *, stage_ticks: int = 3, **terms) -> Run:
    return Run(make_terms(slots, **terms), stage_ticks=stage_ticks)


def at(stage: Stage, slot: str = "r0c0", run: Run | None = None, **birth) -> Run:
    """A run in which a seed has just come to ``stage``, its ramps done."""
    run = run or run_of()
    run.tick(germinate(slot, **birth))
    run.tick()
    if stage is Stage.GERMINATED:
        return run
    run.tick(ask(slot, "ADVANCE"))
    if stage is Stage.TRAINING:
        return run
    run.tick(ask(slot, "ADVANCE"))
    while not run.slot(slot).ramp_done(run.state.step):
        run.tick()
    if stage is Stage.BLENDING:
        return run
    run.tick(ask(slot, "ADVANCE"))
    if stage is Stage.FOSSILIZED:
        run.tick()
        run.tick(ask(slot, "FOSSILIZE"))
    assert run.slot(slot).stage is stage
    return run


def refusals(run: Run) -> list[str]:
    return [event.reason for event in run.events(CommandRefused)]


def moves(run: Run) -> list[tuple[str, str, str]]:
    return [(e.source.name, e.cause, e.target.name) for e in run.events(StageChanged)]


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
        "heavy", 4, 0.5, Curve.SIGMOID, 3.0,
    )  # fmt: skip
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


# advancing --------------------------------------------------------------------------------------------------------


def test_a_whole_life_on_command():
    run = run_of()
    seen = []
    script = {1: germinate("r0c0", ticks=2), 3: ask("r0c0", "ADVANCE"), 4: ask("r0c0", "ADVANCE")}
    script |= {7: ask("r0c0", "ADVANCE"), 9: ask("r0c0", "FOSSILIZE")}
    for tick in range(1, 11):
        run.tick(*([script[tick]] if tick in script else []))
        assert refusals(run) == []
        seen.append((run.slot().stage, run.slot().alpha(run.state.step)))
    stages = [stage.name for stage, _ in seen]
    assert stages == [
        "EMPTY", "GERMINATED", "TRAINING", "BLENDING", "BLENDING", "BLENDING", "HOLDING", "HOLDING", "FOSSILIZED",
        "FOSSILIZED",
    ]  # fmt: skip
    assert [alpha for _, alpha in seen] == pytest.approx([0, 0, 0, 0, 0.5, 1, 1, 1, 1, 1])
    assert run.slot().learn_step == 30
    assert [line.tick for line in run.slot().history] == [2, 3, 4, 7, 9]


def test_immediate_incubation_blends_from_birth():
    run = run_of(incubation=Incubation.IMMEDIATE)
    run.tick(germinate("r0c0", ticks=3, target=0.75))
    run.tick()
    run.tick(ask("r0c0", "ADVANCE"))
    assert moves(run) == [("GERMINATED", "ADVANCE", "BLENDING")]
    ramp = run.slot().ramp
    assert (ramp.start, ramp.target, ramp.first_step, ramp.last_step) == (0.0, 0.75, 30, 60)
    assert run.slot().learn_step == 30


def test_what_advances_by_itself_is_config_and_fossilising_never_does():
    run = run_of(gates={"auto_advance": ["G1", "G2", "G3"], "evidence": EvidencePolicy.ENFORCE})
    run.tick(germinate("r0c0", ticks=1))
    history = []
    for _ in range(12):
        run.tick(evidence={"r0c0": GOOD})
        history += moves(run)
    assert [target for _, _, target in history] == ["GERMINATED", "TRAINING", "BLENDING", "HOLDING"]
    assert run.slot().stage is Stage.HOLDING


def test_without_evidence_nothing_advances_by_itself():
    run = run_of(gates={"auto_advance": ["G1", "G2"], "evidence": EvidencePolicy.ENFORCE})
    run.tick(germinate("r0c0"))
    for _ in range(10):
        run.tick(evidence={"r0c0": BAD})
    assert run.slot().stage is Stage.TRAINING
    assert run.slot().looks == run.terms.gates.looks


def test_one_gate_may_advance_by_itself_and_the_others_wait():
    run = run_of(gates={"auto_advance": ["G1"]})
    run.tick(germinate("r0c0"))
    for _ in range(5):
        run.tick()
    assert run.slot().stage is Stage.TRAINING
    assert run.slot().proposal == 0


def test_a_gate_refuses_on_its_evidence_under_enforce_and_only_tells_under_observe():
    for policy, stage in ((EvidencePolicy.ENFORCE, Stage.TRAINING), (EvidencePolicy.OBSERVE, Stage.BLENDING)):
        run = at(Stage.TRAINING, run=run_of(gates={"evidence": policy}))
        run.tick(ask("r0c0", "ADVANCE"), evidence={"r0c0": BAD})
        assert run.slot().stage is stage
        (gate,) = run.events(GateJudged)
        assert (gate.result.gate, gate.enforced) == (Gate.G2, policy is EvidencePolicy.ENFORCE)
        assert gate.result.passed == (policy is EvidencePolicy.OBSERVE)
        assert not next(check for check in gate.result.checks if check.name == "contribution").passed
        if policy is EvidencePolicy.ENFORCE:
            assert refusals(run)[0].startswith("G2: contribution: contribution -0.5")


def test_a_seed_that_no_rank_owns_does_not_advance_under_any_policy():
    run = at(Stage.GERMINATED)
    run.tick(ask("r0c0", "ADVANCE"), r0c0__owned=1)
    assert run.slot().stage is Stage.GERMINATED
    assert refusals(run) == ["G1: owned: some parameter stands in no optimizer group on some rank"]


# ramps ------------------------------------------------------------------------------------------------------------


def test_a_partial_target_rests_in_blending_and_a_retarget_completes_it():
    run = at(Stage.BLENDING, target=0.5)
    assert run.slot().alpha(run.state.step) == 0.5
    run.tick(ask("r0c0", "ADVANCE"))
    assert refusals(run) == ["alpha target is 0.5, HOLDING needs 1"]
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=1.0, ticks=3))
    assert (run.slot().stage, run.slot().ramp.start, run.slot().ramp.target) == (Stage.BLENDING, 0.5, 1.0)
    assert moves(run) == []
    for command in ("ADVANCE", "SET_ALPHA_TARGET"):
        run.tick(ask("r0c0", command, target=0.25))
        assert refusals(run)[0].startswith("a ramp is under way")
    run.tick()
    run.tick(ask("r0c0", "ADVANCE"))
    assert run.slot().stage is Stage.HOLDING


def test_a_lower_target_takes_holding_back_to_blending_without_a_jump():
    run = at(Stage.HOLDING)
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.25, ticks=2, curve=Curve.LINEAR))
    assert moves(run) == [("HOLDING", "SET_ALPHA_TARGET", "BLENDING")]
    alphas = []
    for _ in range(4):
        alphas.append(run.slot().alpha(run.state.step))
        run.tick()
    assert alphas == [1.0, 0.625, 0.25, 0.25]


def test_full_target_keeps_holding():
    run = at(Stage.HOLDING)
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=1.0, ticks=2))
    assert (run.slot().stage, moves(run)) == (Stage.HOLDING, [])
    assert run.slot().alpha_mode(run.state.step) is AlphaMode.UP


def test_a_prune_by_ramp_ends_by_itself_and_is_not_begun_anew():
    run = at(Stage.HOLDING)
    run.tick(ask("r0c0", "PRUNE", ticks=2, curve=Curve.LINEAR))
    assert (run.slot().stage, run.slot().ending, run.slot().ramp.target) == (Stage.BLENDING, True, 0.0)
    assert run.out.effects == []
    run.tick(ask("r0c0", "PRUNE", ticks=2))
    assert refusals(run) == ["a ramp is under way; only PRUNE now interrupts it"]
    assert run.slot().alpha(run.state.step) == 0.5
    run.tick(ask("r0c0", "PRUNE", ticks=2))  # at its very end, too
    assert refusals(run) == ["a ramp is under way; only PRUNE now interrupts it"]
    assert moves(run) == [("BLENDING", "RAMP_END", "PRUNED")]
    assert run.out.effects == [Uproot("r0c0")]


@pytest.mark.parametrize("ticks", [1, 2])
def test_only_prune_now_interrupts_a_ramp(ticks):
    for interrupted in ("up", "ending"):
        run = at(Stage.TRAINING, ticks=5) if interrupted == "up" else at(Stage.HOLDING)
        run.tick(ask("r0c0", "ADVANCE") if interrupted == "up" else ask("r0c0", "PRUNE", ticks=5))
        for _ in range(ticks):
            run.tick()
        assert run.slot().alpha_mode(run.state.step) is not AlphaMode.HOLD
        run.tick(ask("r0c0", "PRUNE", ticks=0))
        assert moves(run) == [("BLENDING", "PRUNE", "PRUNED")]


def test_a_ramp_down_needs_something_to_ramp():
    run = at(Stage.TRAINING)
    run.tick(ask("r0c0", "PRUNE", ticks=2))
    assert refusals(run) == ["prune by ramp needs BLENDING or HOLDING, slot is TRAINING"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"target": 1.5}, "alpha target 1.5"),
        ({"target": float("nan")}, "alpha target nan"),
        ({"ticks": -1}, "ramp of -1 ticks"),
        ({"steepness": 0.0}, "steepness 0.0"),
    ],
)
def test_absurd_arguments_are_refused_before_anything_happens(fields, said):
    run = at(Stage.BLENDING)
    before = run.slot().ramp
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", **fields))
    assert refusals(run)[0].startswith(said)
    assert run.slot().ramp == before
    assert run.events(RampCommitted) == []


# cool-down and looks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embargo", [0, 1, 2, 5])
def test_the_cool_down_takes_one_tick_the_embargo_and_one_tick(embargo):
    run = at(Stage.TRAINING, run=run_of(embargo_ticks=embargo))
    run.tick(ask("r0c0", "PRUNE"))
    stages = [run.slot().stage.name]
    while stages[-1] != "EMPTY":
        run.tick(germinate("r0c0"))  # refused until the slot is empty again
        stages.append(run.slot().stage.name)
        assert run.slot().staged is None
    assert stages == ["PRUNED", *["EMBARGOED"] * embargo, "RESETTING", "EMPTY"]
    run.tick(germinate("r0c0"))
    assert run.out.effects[0].generation == 2


def test_looks_come_on_schedule_and_then_only_prune_is_left():
    gates = {"first_look": 3, "look_every": 2, "looks": 4, "evidence": EvidencePolicy.ENFORCE}
    run = at(Stage.TRAINING, run=run_of(gates=gates))
    since, looked = run.state.tick, []
    for _ in range(16):
        asked = run.slot().request
        run.tick(evidence={"r0c0": BAD})
        if asked is not None:
            looked.append((run.state.tick - since, asked.look, asked.alpha, asked.draw))
    assert looked == [(3 + 2 * i, i + 1, 1.0, f"1.TRAINING.0.{i + 1}") for i in range(4)]
    run.tick(ask("r0c0", "ADVANCE"), evidence={"r0c0": GOOD})
    assert "stale" in refusals(run)[0]
    run.tick(ask("r0c0", "PRUNE"))
    assert run.slot().stage is Stage.PRUNED


def test_a_new_ramp_begins_new_looks():
    run = at(Stage.BLENDING, target=0.5)
    run.tick()
    assert run.slot().looks > 0
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=1.0, ticks=2))
    assert (run.slot().looks, run.slot().request) == (0, None)


def test_a_look_is_asked_at_the_alpha_at_which_the_ramp_rests():
    run = at(Stage.TRAINING, ticks=3, target=0.5)
    run.tick(ask("r0c0", "ADVANCE"))
    first = run.state.step
    requests = []
    for _ in range(4):
        requests.append(run.slot().request)
        run.tick()
    # the ramp ends with the third tick: the request is made one tick before
    assert requests[:2] == [None, None]
    assert requests[2] == ProbeRequest(look=1, alpha=0.5, draw=f"1.BLENDING.{first}.1")


def test_what_a_fossil_was_worth_stays_on_record():
    run = at(Stage.HOLDING)
    run.tick(evidence={"r0c0": GOOD})
    run.tick(ask("r0c0", "FOSSILIZE"), evidence={"r0c0": GOOD})
    worth = run.slot().contribution
    assert worth.value == 0.5
    for _ in range(5):
        run.tick()
    assert run.slot().contribution == worth
    assert run.slot().request is None


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
