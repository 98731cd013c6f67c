"""From sums to state and from state to what a controller sees, against numbers worked out by hand."""

import math
import statistics
from dataclasses import replace

import pytest

from esper.accord.absorb import absorb
from esper.accord.config import EvidencePolicy
from esper.accord.evidence.plan import ProbePlan
from esper.accord.evidence.record import Evidence
from esper.accord.facts import embargo_left, facts_of, max_looks, running_of, verdict_ahead
from esper.accord.lifecycle import ProbeRequest
from esper.accord.observation import observation_of
from esper.leyline.alpha import AlphaMode, Curve, Operator, Ramp
from esper.leyline.evidence import ABSENT, NO_HEALTH, GradientHealth, Status, measured
from esper.leyline.observation import Budgets
from esper.leyline.stages import Gate, Stage
from esper.tolaria.lockstep.wire import ObserveLayout
from tests.support.agreed_states import CATALOGUE, Run, ask, germinate, make_terms, sums_of_singles

RAMP = Ramp(
    start=0.2, target=0.6, first_step=20, last_step=60, curve=Curve.LINEAR, steepness=6.0, operator=Operator.ADD
)


def seeded(run: Run, **changes):
    """A blending seed in r0c0 at tick 5, step 40: half-way along its ramp."""
    slot = replace(
        run.slot("r0c0"),
        stage=Stage.BLENDING,
        since_tick=3,
        generation=2,
        blueprint="light",
        operator=Operator.ADD,
        curve=Curve.LINEAR,
        tempo=4,
        target=0.6,
        ramp=RAMP,
        learn_step=0,
        finite=True,
        owned=True,
    )
    state = run.state.with_slots({"r0c0": replace(slot, **changes)})
    return replace(state, tick=5, step=40, epoch=1)


def zeros(terms, **values):
    found = dict.fromkeys(ObserveLayout(list(terms.places)).names, 0.0)
    return found | {key.replace("__", "."): value for key, value in values.items()}


def absorbed(state, terms, **values):
    return absorb(state, zeros(terms, **values), terms, step=50, epoch=2)


# absorb -----------------------------------------------------------------------------------------------------------


def test_clocks_and_means_of_training():
    terms = make_terms()
    state = absorbed(
        seeded(Run(terms)),
        terms,
        train_loss=150.0,
        train_correct=60.0,
        train_count=100.0,
        host_norm=8.0,
        host_norm_steps=4.0,
        skipped=1.0,
        skipped_in_row=1.0,
    )
    assert (state.tick, state.step, state.epoch, state.skipped, state.skipped_in_row) == (6, 50, 2, 1, 1)
    assert state.train_loss == measured(1.5, tick=6, n=100)
    assert state.train_accuracy == measured(0.6, tick=6, n=100)
    assert state.host_norm == measured(2.0, tick=6, n=4)


def test_what_was_not_counted_is_absent_and_never_zero():
    terms = make_terms()
    state = absorbed(seeded(Run(terms)), terms)
    for reading in (state.train_loss, state.train_accuracy, state.host_norm):
        assert reading is ABSENT
    assert state.validation_loss is ABSENT
    assert state.slot("r0c0").gradient_norm is ABSENT
    assert state.slot("r0c0").contribution is ABSENT


def test_validation_is_mean_and_standard_error_and_stays_until_the_next_one():
    losses, correct = [0.5, 1.25, 2.0, 0.25], [1, 0, 0, 1]
    terms = make_terms(gates={"fresh_ticks": 1})
    state = absorbed(
        seeded(Run(terms)),
        terms,
        validation_loss=sum(losses),
        validation_loss_sq=sum(x * x for x in losses),
        validation_correct=2.0,
        validation_correct_sq=2.0,
        validation_count=4.0,
    )
    assert (state.validation_loss.value, state.validation_loss.n, state.validation_loss.tick) == (1.0, 4, 6)
    assert state.validation_loss.se == pytest.approx(statistics.stdev(losses) / 2, rel=1e-12)
    assert state.validation_accuracy.se == pytest.approx(statistics.stdev(correct) / 2, rel=1e-12)
    later = absorbed(absorbed(state, terms), terms)
    assert later.validation_loss == state.validation_loss
    assert observation_of(state, terms).validation_loss.status is Status.MEASURED
    assert observation_of(later, terms).validation_loss.status is Status.STALE


def test_a_validation_that_was_not_finite_is_absent():
    terms = make_terms()
    layout = ObserveLayout(list(terms.places))
    healthy = {"validation_loss": 8.0, "validation_loss_sq": 20.0, "validation_correct": 3.0, "validation_count": 5.0}
    vector = layout.encode(healthy, 0) + layout.encode(healthy | {"validation_loss": math.nan}, 1)
    before = replace(seeded(Run(terms)), validation_loss=measured(2.0, tick=5, n=10, se=0.1))
    state = absorb(before, layout.decode(vector), terms, step=50, epoch=2)
    assert state.validation_loss is ABSENT
    assert state.validation_accuracy is ABSENT


def test_health_needs_every_rank():
    terms = make_terms(world_size=3)
    for count, healthy in ((3.0, True), (2.0, False), (0.0, False)):
        state = absorbed(seeded(Run(terms)), terms, r0c0__finite=count, r0c0__owned=count)
        assert (state.slot("r0c0").finite, state.slot("r0c0").owned) == (healthy, healthy)


def test_a_gradient_norm_is_a_mean_over_steps_and_an_old_one_ages():
    terms = make_terms(gates={"fresh_ticks": 1})
    state = absorbed(seeded(Run(terms)), terms, r0c0__norm=3.0, r0c0__norm_steps=4.0, r0c0__nonfinite=2.0)
    assert state.slot("r0c0").gradient_norm == measured(0.75, tick=6, n=4)
    assert state.slot("r0c0").nonfinite_steps == 2
    later = absorbed(absorbed(state, terms), terms)
    assert later.slot("r0c0").gradient_norm == measured(0.75, tick=6, n=4)
    assert later.slot("r0c0").nonfinite_steps == 0
    assert observation_of(later, terms).slot("r0c0").gradient_norm.status is Status.STALE
    assert facts_of(later, later.slot("r0c0"), terms).gradient_norm.status is Status.STALE


def test_health_of_host_and_slots_is_a_mean_over_sampled_steps_and_its_counts_are_of_all():
    terms = make_terms(gates={"fresh_ticks": 1})
    sums = {"vanishing": 1.5, "exploding": 0.25, "health_steps": 4.0, "nans": 7.0, "infs": 2.0}
    sums |= {"numbers": 36.0, "update_rms": 1.0, "update_steps": 2.0}
    host = {"vanishing": 0.5, "exploding": 0.0, "health_steps": 5.0, "nans": 0.0, "infs": 1.0}
    host |= {"numbers": 45.0, "update_rms": 0.5, "update_steps": 2.0}
    values = {f"r0c0__{name}": value for name, value in sums.items()}
    values |= {f"host_{name}": value for name, value in host.items()}
    values |= {"r0c0__norm": 3.0, "r0c0__norm_steps": 4.0, "host_norm": 12.0, "host_norm_steps": 8.0}
    state = absorbed(seeded(Run(terms)), terms, **values)
    seen = observation_of(state, terms)
    view = seen.slot("r0c0")
    assert view.health == GradientHealth(
        vanishing=measured(0.375, tick=6, n=4),
        exploding=measured(0.0625, tick=6, n=4),
        nans=7,
        infs=2,
        gradient_rms=measured(0.25, tick=6, n=4),
        update_rms=measured(0.5, tick=6, n=2),
        host_update_rms=measured(0.25, tick=6, n=2),
    )
    assert (view.gradient_parity, view.update_parity) == (measured(0.5, tick=6, n=4), measured(2.0, tick=6, n=2))
    assert view.gradient_ratio == measured(0.5, tick=6, n=4)
    assert (seen.host_gradient_norm, seen.host_health.vanishing) == (
        measured(1.5, tick=6, n=8),
        measured(0.1, tick=6, n=5),
    )
    assert seen.host_health.update_rms is ABSENT, "the host's record does not depend on its seeds"
    assert (seen.host_health.nans, seen.host_health.infs) == (0, 1)
    assert facts_of(state, state.slot("r0c0"), terms).health == view.health
    later = absorbed(absorbed(state, terms), terms)
    aged = observation_of(later, terms).slot("r0c0")
    assert (aged.health.vanishing.status, aged.health.nans) == (Status.STALE, 0)
    assert (aged.gradient_parity.value, aged.gradient_parity.status) == (0.5, Status.STALE)
    assert aged.gradient_ratio is ABSENT, "the host's norm was not measured in that window"
    assert observation_of(seeded(Run(terms)), terms).slot("r0c0").health == NO_HEALTH


def test_a_fallback_is_counted_in_ranks_and_remembered_from_its_first_tick():
    terms = make_terms()
    state, seen = seeded(Run(terms)), []
    for ranks in (0.0, 1.0, 2.0, 0.0, 1.0):
        state = absorbed(state, terms, r0c0__degraded=ranks)
        seen.append((state.slot("r0c0").degraded, state.slot("r0c0").degraded_tick))
        assert observation_of(state, terms).slot("r0c0").degraded == facts_of(state, state.slot("r0c0"), terms).degraded
    assert seen == [(0, None), (1, 7), (2, 7), (0, None), (1, 10)]


REQUEST = ProbeRequest(look=3, shares=10, alpha=0.6, aim="REST", draw="2", counts=False)


def probe_sums(*sums: float) -> dict[str, float]:
    return {f"r0c0__probe_{name}": value for name, value in sums_of_singles(*sums).items()}


def test_a_probe_answers_its_request_once():
    differences = [0.1 * i - 0.4 for i in range(64)]
    terms = make_terms()
    state = absorbed(
        seeded(Run(terms), request=REQUEST),
        terms,
        **probe_sums(64, *(sum(d**power for d in differences) for power in (1, 2, 3))),
    )
    slot = state.slot("r0c0")
    assert slot.contribution.value == pytest.approx(statistics.fmean(differences))
    assert slot.contribution.se == pytest.approx(statistics.stdev(differences) / 8)
    assert (slot.contribution.n, slot.contribution.tick) == (64, 6)
    assert slot.contribution.skew == pytest.approx(0.0, abs=1e-9)  # evenly spaced
    assert (slot.contribution_alpha, slot.drawn, slot.retold, slot.request) == (0.6, 3, 0, None)
    assert slot.evidence is None, "no gate asks at a partial alpha"


def test_looks_that_count_add_up():
    differences = [[0.1 * i - 0.4 for i in range(64)], [0.05 * i for i in range(70)]]
    terms, before = make_terms(gates={"min_samples": 64}), seeded(Run(make_terms()))
    state = before.with_slots({"r0c0": replace(before.slot("r0c0"), evidence=Evidence(begun=2))})
    for look, d in enumerate(differences, 3):
        asked = replace(state.slot("r0c0"), request=replace(REQUEST, look=look, alpha=1.0, aim="G3", counts=True))
        state = absorbed(
            state.with_slots({"r0c0": asked}), terms, **probe_sums(len(d), *(sum(x**k for x in d) for k in (1, 2, 3)))
        )
    slot, together = state.slot("r0c0"), differences[0] + differences[1]
    assert slot.contribution.value == pytest.approx(statistics.fmean(differences[1])), "the newest look alone"
    running = running_of(slot, terms)
    assert (running.n, running.tick, slot.evidence.looks, slot.drawn) == (134, 7, 2, 4)
    assert running.value == pytest.approx(statistics.fmean(together))
    assert running.se == pytest.approx(statistics.stdev(together) / math.sqrt(134))
    view = observation_of(state, terms).slot("r0c0")
    assert view.running == running
    assert view.helps > 1.0 > view.hurts


def test_probe_sums_that_nobody_asked_for_change_nothing():
    terms = make_terms()
    state = absorbed(seeded(Run(terms)), terms, **probe_sums(64, 1.0, 1.0))
    assert (state.slot("r0c0").contribution, state.slot("r0c0").drawn) == (ABSENT, 0)


@pytest.mark.parametrize("count", [0, 1, 63])
def test_a_look_with_too_few_samples_is_spent_and_absent(count):
    terms = make_terms(gates={"min_samples": 64})
    before = seeded(Run(terms), request=REQUEST, contribution=measured(9.0, tick=5, n=64, se=0.1))
    state = absorbed(before, terms, **probe_sums(count, 9.0 * count, 81.0 * count))
    assert state.slot("r0c0").contribution is ABSENT
    assert state.slot("r0c0").drawn == 3


def test_a_probe_that_was_not_finite_on_some_rank_is_absent_and_no_gate_takes_it_for_zero():
    terms = make_terms(gates={"evidence": EvidencePolicy.ENFORCE})
    layout = ObserveLayout(list(terms.places))
    own = {"r0c0.probe_clusters": 64.0, "r0c0.probe_count": 64.0, "r0c0.probe_total": math.nan}
    own |= {"r0c0.finite": 1.0, "r0c0.owned": 1.0}
    done = replace(RAMP, target=1.0, last_step=40)
    before = seeded(Run(terms), request=replace(REQUEST, alpha=1.0), ramp=done)
    sums = layout.decode(layout.encode(own, 0) + layout.encode(own, 1))
    assert sums["r0c0.probe_total"] == 0.0  # what a reader of sums alone would take for "does no harm"
    state = absorb(before, sums, terms, step=50, epoch=2)
    assert state.slot("r0c0").contribution is ABSENT
    verdict = verdict_ahead(state, state.slot("r0c0"), terms)
    assert (verdict.gate, verdict.passed) == (Gate.G3, False)


def test_an_empty_slot_takes_nothing_in():
    terms = make_terms()
    before = Run(terms).state
    state = absorbed(before, terms, r0c0__finite=2.0, r0c0__norm=1.0, r0c0__norm_steps=1.0)
    assert state.slots == before.slots


# observe ----------------------------------------------------------------------------------------------------------


def test_every_field_of_a_slot_in_mid_ramp():
    terms = make_terms()
    view = observation_of(seeded(Run(terms)), terms).slot("r0c0")
    assert (view.stage, view.staged, view.dwell, view.min_dwell, view.generation) == (Stage.BLENDING, False, 2, 1, 2)
    assert (view.blueprint, view.operator, view.curve, view.parameters) == ("light", Operator.ADD, Curve.LINEAR, 10)
    assert view.alpha == pytest.approx(0.4)  # half-way from 0.2 to 0.6
    assert view.alpha_target == 0.6
    assert view.alpha_velocity == pytest.approx(0.1)  # 0.4 over 40 steps, ticks of 10
    assert view.ramp_progress == pytest.approx(0.5)
    assert (view.alpha_mode, view.ending) == (AlphaMode.UP, False)
    assert (view.looks, view.max_looks, view.embargo_left) == (0, terms.probe.looks, 0)
    assert (view.running, view.helps, view.hurts, view.level) == (ABSENT, None, None, 1.0)
    assert (view.row, view.col, view.catalogue) == (0.0, 0.0, CATALOGUE)
    assert view.verdict.gate is Gate.G3
    assert observation_of(seeded(Run(terms)), terms).slot("r0c1").col == 1.0


def test_every_field_of_an_empty_slot():
    terms = make_terms()
    view = observation_of(seeded(Run(terms)), terms).slot("r0c1")
    assert (view.stage, view.staged, view.dwell, view.generation) == (Stage.EMPTY, False, 5, 0)
    assert (view.blueprint, view.operator, view.curve, view.parameters) == (None, None, None, 0)
    assert (view.alpha, view.alpha_target, view.alpha_velocity, view.ramp_progress) == (0.0, 0.0, 0.0, 0.0)
    assert (view.alpha_mode, view.ending, view.verdict) == (AlphaMode.HOLD, False, None)
    assert (view.contribution, view.gradient_norm, view.looks, view.max_looks) == (ABSENT, ABSENT, 0, 0)


def test_globals_of_the_observation():
    terms = make_terms(total_steps=160)
    state = replace(seeded(Run(terms)), skipped=3, train_loss=measured(1.5, tick=5, n=9))
    seen = observation_of(state, terms)
    assert (seen.tick, seen.step, seen.total_steps, seen.remaining, seen.skipped_steps) == (5, 40, 160, 0.75, 3)
    assert seen.train_loss == measured(1.5, tick=5, n=9)
    assert [slot.slot for slot in seen.slots] == ["r0c0", "r0c1"]


def test_evidence_is_seen_with_its_age():
    terms = make_terms(gates={"fresh_ticks": 2})
    for tick, status in ((5, Status.MEASURED), (3, Status.MEASURED), (2, Status.STALE)):
        state = seeded(Run(terms), contribution=measured(0.5, tick=tick, n=64, se=0.1))
        assert observation_of(state, terms).slot("r0c0").contribution.status is status
        assert facts_of(state, state.slot("r0c0"), terms).contribution.status is status


def test_a_seed_that_is_ending_has_no_gate_ahead():
    terms = make_terms()
    state = seeded(Run(terms), ending=True)
    assert verdict_ahead(state, state.slot("r0c0"), terms) is None


@pytest.mark.parametrize(
    ("stage", "gate"),
    [
        (Stage.EMPTY, None),
        (Stage.GERMINATED, Gate.G1),
        (Stage.TRAINING, Gate.G2),
        (Stage.BLENDING, Gate.G3),
        (Stage.HOLDING, Gate.G5),
        (Stage.FOSSILIZED, Gate.G6),
        (Stage.PRUNED, None),
    ],
)
def test_the_gate_ahead_of_a_stage(stage, gate):
    terms = make_terms()
    state = seeded(Run(terms), stage=stage)
    verdict = verdict_ahead(state, state.slot("r0c0"), terms)
    assert (verdict and verdict.gate) == gate


def test_looks_are_scheduled_where_something_is_measured():
    terms = make_terms(probe=ProbePlan(samples=900, clusters=900, looks=7, reserve=2))
    scheduled = {stage: max_looks(stage, terms) for stage in Stage}
    assert {stage: n for stage, n in scheduled.items() if n} == {
        Stage.TRAINING: 3,
        Stage.BLENDING: 7,
        Stage.HOLDING: 7,
        Stage.FOSSILIZED: 9,
    }


@pytest.mark.parametrize("embargo", [0, 1, 2, 5])
def test_embargo_left_counts_down_to_the_tick_at_which_the_slot_is_empty(embargo):
    run = Run(make_terms(embargo_ticks=embargo))
    run.tick(germinate("r0c0"))
    run.tick()
    run.tick(ask("r0c0", "PRUNE"))
    announced = []
    while run.slot().stage is not Stage.EMPTY:
        announced.append(embargo_left(run.slot(), run.state.tick, run.terms))
        assert observation_of(run.state, run.terms).slot("r0c0").embargo_left == announced[-1]
        run.tick()
    assert announced == list(range(embargo + 2, 0, -1))
    assert embargo_left(run.slot(), run.state.tick, run.terms) == 0


def test_budgets_count_the_staged_the_living_and_the_fossils():
    run = Run(make_terms(3, max_live=2, max_germinations=4, max_parameters=1000, max_flops=9500))
    assert run.terms.budgets(run.state) == Budgets(live=2, germinations=4, parameters=1000, flops=9500)
    run.tick(germinate("r0c0", "heavy"))
    assert run.slot("r0c0").staged is not None
    assert run.terms.budgets(run.state) == Budgets(live=1, germinations=3, parameters=100, flops=500)
    run.tick(germinate("r0c1", "light"))
    run.tick()
    assert run.terms.budgets(run.state) == Budgets(live=0, germinations=2, parameters=90, flops=400)
    fossil = replace(run.slot("r0c1"), stage=Stage.FOSSILIZED)
    run.state = run.state.with_slots({"r0c1": fossil})
    assert run.terms.budgets(run.state) == Budgets(live=1, germinations=2, parameters=90, flops=400)
    run.tick(ask("r0c0", "PRUNE"))
    assert run.terms.budgets(run.state) == Budgets(live=2, germinations=2, parameters=990, flops=9400)
    free = make_terms()
    assert free.budgets(Run(free).state) == Budgets(live=None, germinations=None, parameters=None, flops=None)


def test_facts_are_those_of_the_slot():
    terms = make_terms()
    state = seeded(Run(terms), nonfinite_steps=2, finite=True, owned=False, blueprint="noop")
    facts = facts_of(state, state.slot("r0c0"), terms, refusal="because")
    assert (facts.stage, facts.dwell, facts.finite, facts.owned) == (Stage.BLENDING, 2, True, False)
    assert (facts.refusal, facts.nonfinite_steps, facts.trainable) == ("because", 2, False)
    assert (facts.alpha, facts.ramp_done) == (pytest.approx(0.4), False)
