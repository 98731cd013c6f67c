"""The reducer case by case: advancing, ramps, looks, cool-down."""

import pytest

from esper.accord.config import EvidencePolicy
from esper.accord.effects import Uproot
from esper.accord.evidence.levels import level_of_birth, share_of_start
from esper.accord.evidence.plan import ProbePlan
from esper.accord.lifecycle import ProbeRequest
from esper.accord.observation import observation_of
from esper.leyline.alpha import AlphaMode, Curve
from esper.leyline.events import GateJudged, RampCommitted
from esper.leyline.legality import legal_ops
from esper.leyline.stages import Gate, Incubation, Op, Stage
from tests.support.agreed_states import ask, at, germinate, moves, refusals, run_of

GOOD, BAD, NONE = (100, 50.0, 26.0), (100, -50.0, 26.0), (0, 0.0, 0.0)


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
        "EMPTY",
        "GERMINATED",
        "TRAINING",
        "BLENDING",
        "BLENDING",
        "BLENDING",
        "HOLDING",
        "HOLDING",
        "FOSSILIZED",
        "FOSSILIZED",
    ]
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
    assert run.slot().drawn == run.terms.probe.training_looks == 4


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
            assert refusals(run)[0].startswith("G2: contribution: -0.5")


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
        ({"steepness": 1e-17}, "steepness 1e-17: need 0.01 to 50"),
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
    gates = {"first_look": 3, "look_every": 2, "evidence": EvidencePolicy.ENFORCE}
    run = at(Stage.TRAINING, run=run_of(gates=gates))
    since, looked = run.state.tick, []
    for _ in range(16):
        asked = run.slot().request
        run.tick(evidence={"r0c0": BAD})
        if asked is not None:
            looked.append((run.state.tick - since, asked.look, asked.alpha, asked.draw))
    assert looked == [(3 + 2 * i, i + 1, 1.0, "1") for i in range(4)], "half of the nine looks are open to G2"
    run.tick(ask("r0c0", "ADVANCE"), evidence={"r0c0": GOOD})
    assert "stale" in refusals(run)[0]
    assert "4 of 4 looks spent, only PRUNE is left" in refusals(run)[0]
    seen = observation_of(run.state, run.terms)
    assert legal_ops(seen, seen.slot("r0c0")) == (Op.WAIT, Op.ADVANCE, Op.PRUNE)  # and ADVANCE has its gate
    run.tick(ask("r0c0", "PRUNE"))
    assert run.slot().stage is Stage.PRUNED


def spend(run, op, evidence=GOOD, idle=4, **fields):
    """Ticks until the slot has been looked at no more for a while; which looks there were, and how often ``op`` passed.

    ``op`` is asked for at every tick and carried out wherever the gate lets it; None only waits.
    """
    looked, passed, still = [], 0, 0
    while still < idle and len(looked) < 12:
        request = run.slot().request
        looked += [(request.aim, request.look)] if request is not None else []
        still = 0 if request is not None else still + 1
        run.tick(*([ask("r0c0", op, **fields)] if op else []), evidence={"r0c0": evidence})
        passed += not refusals(run)
    return looked, passed


def test_no_retarget_buys_another_look_and_each_start_of_evidence_has_less_of_the_level():
    probe = ProbePlan(samples=700, clusters=700, looks=6, reserve=1)
    gates = {"look_every": 2, "evidence": EvidencePolicy.ENFORCE}
    run = at(Stage.BLENDING, run=run_of(gates=gates, probe=probe), target=0.5)
    assert (run.slot().drawn, run.slot().evidence) == (1, None), "G2 drew one; alpha has moved since"
    looked, _ = spend(run, None, idle=11)
    assert set(looked) == {("REST", 1)}, "a reading at a partial alpha goes over what was drawn before, and seldom"
    levels = []
    for start, drawn in enumerate((2, 3, 4, 5)):  # down and up again: each time evidence begins anew
        run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.5, ticks=0))
        run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=1.0, ticks=0))
        while run.slot().request is None:
            run.tick()
        run.tick(evidence={"r0c0": BAD})
        evidence = run.slot().evidence
        assert (run.slot().drawn, evidence.begun, evidence.looks, evidence.start) == (drawn, drawn - 1, 1, start)
        run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.5, ticks=0))
        levels.append(run.slot().level * share_of_start(start))
    assert sum(levels) < run.slot().level == level_of_birth(0.05, 1, 0)
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=1.0, ticks=0))
    looked, _ = spend(run, "ADVANCE", GOOD)
    assert looked == [("G3", 6), ("G5", 7)], "the last one, and the reserve for a seed that is held"
    assert (run.slot().stage, run.slot().drawn) == (Stage.HOLDING, 7)
    looked, _ = spend(run, None, GOOD, idle=12)
    assert {look for _, look in looked} <= set(range(1, 8)), "then what was drawn before is told"
    assert run.slot().evidence.looks == 2


def test_looks_of_g3_and_g5_add_up_and_those_of_g2_stand_alone():
    run = at(Stage.BLENDING, run=run_of(gates={"evidence": EvidencePolicy.ENFORCE}))
    while run.slot().stage is not Stage.FOSSILIZED:
        op = "FOSSILIZE" if run.slot().stage is Stage.HOLDING else "ADVANCE"
        run.tick(ask("r0c0", op), evidence={"r0c0": GOOD})
        assert run.state.tick < 40
    held = run.absorbed.slot("r0c0")
    assert (held.evidence.begun, held.evidence.looks, held.drawn) == (1, 5, 6)
    assert run.slot().evidence is None, "what is said of a fossil begins anew"
    assert held.evidence.sums.clusters == 500, "467 are asked for, so that harm to 1 in 100 cannot go unseen"


def test_a_new_life_has_new_looks_with_a_permutation_of_its_own():
    run = at(Stage.TRAINING)
    spend(run, None)
    first = run.slot().drawn
    run.tick(ask("r0c0", "PRUNE"))
    assert run.slot().drawn == 0
    while run.slot().stage is not Stage.EMPTY:
        run.tick()
    at(Stage.TRAINING, run=run)
    asked = run.slot().request
    assert (first, run.slot().drawn, asked.look, asked.draw) == (4, 0, 1, "2")


def test_the_level_is_fixed_at_birth_by_births_and_fossils_so_far():
    run = run_of(slots=2)
    at(Stage.FOSSILIZED, run=run)
    assert run.slot().level == level_of_birth(0.05, 1, 0)
    at(Stage.TRAINING, "r0c1", run=run)
    assert (run.slot("r0c1").birth, run.slot("r0c1").level) == (2, level_of_birth(0.05, 2, 1))
    run.tick(ask("r0c1", "PRUNE"))
    while run.slot("r0c1").stage is not Stage.EMPTY:
        run.tick()
    assert run.slot("r0c1").level == 1.0
    at(Stage.TRAINING, "r0c1", run=run)
    assert run.slot("r0c1").level == level_of_birth(0.05, 3, 1), "a birth that failed was one"


def test_a_look_is_asked_at_the_alpha_at_which_the_ramp_rests():
    run = at(Stage.TRAINING, ticks=3, target=0.5)
    run.tick(ask("r0c0", "ADVANCE"))
    requests = []
    for _ in range(4):
        requests.append(run.slot().request)
        run.tick()
    # the ramp ends with the third tick: the request is made one tick before
    assert requests[:2] == [None, None]
    assert requests[2] == ProbeRequest(look=1, shares=10, alpha=0.5, aim="REST", draw="1", counts=False)


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


# what does not count as evidence -----------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [GOOD, BAD, (100, 2.0, 4.0)])
def test_two_seeds_of_equal_benefit_get_the_same_verdicts_whatever_their_size_and_gradient(answer):
    """Ninety times the parameters, a hundred times the norm: the same stages at the same ticks, and the same words."""
    lives = []
    for blueprint, norm in (("light", 5.0), ("heavy", 5.0), ("light", 500.0), ("heavy", 5e6)):
        run = run_of(gates={"evidence": EvidencePolicy.ENFORCE})
        run.tick(germinate("r0c0", blueprint, ticks=1))
        told = []
        for _ in range(20):
            op = "FOSSILIZE" if run.slot().stage is Stage.HOLDING else "ADVANCE"
            run.tick(
                ask("r0c0", op), evidence={"r0c0": answer}, **({"r0c0__norm": norm} if run.slot().blueprint else {})
            )
            checks = [check for event in run.events(GateJudged) for check in event.result.checks]
            told.append((run.slot().stage, [(c.name, c.passed) for c in checks], run.slot().contribution))
        lives.append(told)
    assert all(life == lives[0] for life in lives[1:])
    assert (lives[0][-1][0] is Stage.FOSSILIZED) == (answer is GOOD)


def test_a_host_that_gets_better_is_no_evidence_for_the_seed_beside_it():
    """Training and validation loss fall from tick to tick; paired on the same samples the seed changes nothing."""
    run = at(Stage.TRAINING, run=run_of(gates={"evidence": EvidencePolicy.ENFORCE}))
    for tick in range(8):
        loss = 2.0 - 0.2 * tick
        run.tick(
            ask("r0c0", "ADVANCE"),
            evidence={"r0c0": (100, 0.0, 0.5)},
            train_loss=100 * loss,
            train_count=100,
            validation_loss=100 * loss,
            validation_loss_sq=100 * loss**2 + 1,
            validation_count=100,
        )
        assert "contribution" in refusals(run)[0]
    assert run.state.validation_loss.value < 1.0
    assert (run.slot().stage, run.slot().drawn) == (Stage.TRAINING, 4)
