"""A fossil is looked at again, told of if it hurts, and goes by a gate and a ramp that can be taken back."""

import pytest

from esper.accord.config import EvidencePolicy
from esper.accord.effects import Uproot
from esper.accord.evidence.plan import ProbePlan
from esper.accord.lifecycle import learns
from esper.accord.observation import observation_of
from esper.leyline.events import FossilHurts, GateJudged, RampCommitted
from esper.leyline.legality import legal_ops
from esper.leyline.stages import Gate, Op, Stage
from tests.support.agreed_states import Run, ask, at, germinate, moves, refusals, run_of

GOOD, BAD = (100, 50.0, 26.0), (100, -50.0, 26.0)
PROBE = ProbePlan(samples=1000, clusters=1000, looks=5, reserve=2)


def fossil(every: int | None = 3, policy: EvidencePolicy = EvidencePolicy.ENFORCE, **changes) -> Run:
    """A run whose r0c0 has just become a fossil; under enforcement after five looks."""
    gates = {"fossil_every": every, "evidence": EvidencePolicy.OBSERVE}
    run = run_of(gates=gates, **{"probe": PROBE, **changes})
    run = at(Stage.FOSSILIZED, run=run)
    run.terms.gates.evidence = policy
    return run


def looks(run: Run, ticks: int, evidence) -> list[tuple[int, int, bool]]:
    """Tick, share and whether it counts of each look that is measured within so many ticks."""
    seen = []
    for _ in range(ticks):
        request = run.slot().request
        run.tick(evidence={"r0c0": evidence})
        if request is not None:
            assert request.aim == "G6"
            assert request.alpha == 1.0
            seen.append((run.state.tick, request.look, request.counts))
    return seen


def test_looks_come_at_their_own_rate_from_what_the_life_left_and_then_are_only_told():
    run = fossil()
    began, drawn = run.state.tick, run.slot().drawn
    assert run.slot().evidence is None
    seen = looks(run, 40, GOOD)
    ticks, shares, counted = zip(*seen, strict=True)
    assert [tick - began for tick in ticks] == list(range(3, 40, 3))
    assert sum(counted) == PROBE.shares - drawn
    assert list(shares[: sum(counted)]) == list(range(drawn + 1, PROBE.shares + 1))
    assert not any(counted[sum(counted) :])
    assert set(shares[sum(counted) :]) <= set(range(1, PROBE.shares + 1))
    assert run.slot().evidence.looks == sum(counted), "what is only told decides nothing"
    assert run.slot().drawn == PROBE.shares


@pytest.mark.parametrize("every", [None, 3])
def test_null_looks_at_none_and_a_planted_seed_is_not_looked_at(every):
    run = fossil(every)
    assert bool(looks(run, 10, BAD)) == (every is not None)
    planted = run_of(gates={"fossil_every": every}, planted={"r0c0": "light"}, probe=PROBE)
    assert looks(planted, 10, BAD) == []


def test_a_fossil_that_hurts_is_told_and_stays_until_it_is_pruned():
    run = fossil()
    told = []
    for _ in range(8):
        run.tick(evidence={"r0c0": BAD})
        told += run.events(FossilHurts)
    assert told
    assert (told[0].slot, told[0].blueprint, told[0].clusters, told[0].chance) == ("r0c0", "light", 100, 0.05)
    assert told[0].running.value == pytest.approx(-0.5)
    assert run.slot().stage is Stage.FOSSILIZED
    assert run.slot().alpha(run.state.step) == 1.0
    helping = fossil()
    for _ in range(20):
        helping.tick(evidence={"r0c0": GOOD})
        assert helping.events(FossilHurts) == []


def doubted(**changes) -> Run:
    """A fossil of which one look says that it hurts; the next tick may prune it."""
    run = fossil(**changes)
    while not run.events(FossilHurts):
        run.tick(evidence={"r0c0": BAD})
    return run


@pytest.mark.parametrize("policy", EvidencePolicy)
def test_nobody_prunes_a_fossil_without_evidence(policy):
    run = fossil(policy=policy)
    run.tick(ask("r0c0", "PRUNE", ticks=2))
    (verdict,) = [event.result for event in run.events(GateJudged)]
    assert (verdict.gate, verdict.passed) == (Gate.G6, False)
    assert refusals(run)[0].startswith("G6: harm: ")
    while run.slot().evidence is None or not run.slot().evidence.looks:
        run.tick(evidence={"r0c0": GOOD})
    run.tick(ask("r0c0", "PRUNE", ticks=2))
    assert run.slot().ending is False
    assert "newest look" in refusals(run)[0]


def test_a_prune_goes_by_a_ramp_and_leaves_nothing():
    run = doubted(max_live=1)
    run.tick(germinate("r0c1"))
    run.tick()  # the budget of live seeds is spent: a fossil on its way out is not counted
    run = run if run.slot("r0c1").stage is Stage.GERMINATED else pytest.fail("no birth")
    for _ in range(3):
        run.tick(evidence={"r0c0": BAD})
    run.tick(ask("r0c0", "PRUNE", ticks=0), evidence={"r0c0": BAD})
    assert "ramp of at least 1 tick" in refusals(run)[0]
    while run.slot().contribution.tick != run.state.tick:
        run.tick(evidence={"r0c0": BAD})
    run.tick(ask("r0c0", "PRUNE", ticks=3))
    assert refusals(run) == []
    (ramp,) = run.events(RampCommitted)
    assert (ramp.start, ramp.target, ramp.last_step - ramp.first_step) == (1.0, 0.0, 30)
    slot = run.slot()
    assert (slot.stage, slot.ending, slot.evidence, slot.request) == (Stage.FOSSILIZED, True, None, None)
    assert not learns(slot.stage, ending=slot.ending, train_fossils=True)
    assert moves(run) == []
    alphas = []
    for _ in range(2):
        run.tick()
        alphas.append(run.slot().alpha(run.state.step))
    assert alphas == pytest.approx([0.75, 0.25])  # COSINE, as usual
    run.tick()
    assert moves(run) == [("FOSSILIZED", "RAMP_END", "PRUNED")]
    assert run.out.effects == [Uproot("r0c0")]
    assert run.terms.fossils(run.state) == 0
    assert run.slot().blueprint is None


def test_a_prune_is_taken_back_while_its_ramp_runs_and_only_then():
    run = doubted()
    view = observation_of(run.state, run.terms).slot("r0c0")
    assert set(legal_ops(observation_of(run.state, run.terms), view)) == {Op.WAIT, Op.PRUNE}
    assert view.verdict.gate is Gate.G6
    assert view.verdict.passed
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=1.0, ticks=1))
    assert "only a prune that is under way is taken back" in refusals(run)[0]
    run.tick(ask("r0c0", "PRUNE", ticks=4), evidence={"r0c0": BAD})
    while not run.slot().ending:
        run.tick(ask("r0c0", "PRUNE", ticks=4), evidence={"r0c0": BAD})
    run.tick()
    now = run.slot().alpha(run.state.step)
    assert 0.8 < now < 0.9
    run.tick(ask("r0c0", "PRUNE", ticks=2))
    assert "a prune by ramp is under way" in refusals(run)[0]
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=0.5, ticks=2))
    assert "goes back to alpha 1" in refusals(run)[0]
    level, births = run.slot().level, run.state.births
    run.tick(ask("r0c0", "SET_ALPHA_TARGET", target=1.0, ticks=2))
    assert refusals(run) == []
    slot = run.slot()
    assert (slot.stage, slot.ending, slot.level, run.state.births) == (Stage.FOSSILIZED, False, level, births)
    assert learns(slot.stage, ending=slot.ending, train_fossils=True)
    run.tick(ask("r0c0", "PRUNE", ticks=2))
    assert "a ramp is under way" in refusals(run)[0]
    run.tick()
    run.tick()
    assert run.slot().alpha(run.state.step) == 1.0
    assert moves(run) == []
    assert run.slot().evidence is None or run.slot().evidence.looks == 0, "evidence begins anew when alpha has moved"


def test_looks_stop_while_the_ramp_runs():
    run = doubted()
    run.tick(ask("r0c0", "PRUNE", ticks=30), evidence={"r0c0": BAD})
    assert run.slot().ending
    for _ in range(20):
        run.tick()
        assert run.slot().request is None


def test_training_samples_refill_what_a_fossil_may_draw_until_their_time_has_come():
    plan = ProbePlan(samples=1000, clusters=1000, looks=5, reserve=2, refills=(90, 60, 50, 18, 9))
    run = run_of(gates={"fossil_every": 1}, probe=plan, tick_steps=3)
    run = at(Stage.FOSSILIZED, run=run)
    drawn, refilled, told = [], [], 0
    for _ in range(26):
        request = run.slot().request
        if request is not None and request.refill:
            assert run.slot().drawn == plan.shares, "first the shares of the probe"
            assert request.counts
            assert plan.refills[request.look - 1] >= run.state.step + 3
            refilled.append(request.look)
        elif request is not None:
            drawn += [request.look] if request.counts else []
            told += not request.counts
            assert request.counts or refilled, "told only once nothing fresh is left"
        run.tick()
    assert (drawn[-1], refilled) == (plan.shares, [1, 2, 3])
    assert told > 3
    assert (run.slot().refilled, run.slot().evidence.looks) == (3, len(drawn) + 3)
