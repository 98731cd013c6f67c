"""Gates are pure functions of evidence: what is absent or stale refuses, and luck passes no more often than stated."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from esper.accord.config import EvidencePolicy, GateConfig
from esper.accord.gates import GateFacts, judge_gate, standard_errors_above_zero
from esper.leyline.errors import GateError
from esper.leyline.evidence import ABSENT, NO_HEALTH, GradientHealth, Reading, Status, estimate_mean, measured
from esper.leyline.stages import Gate, Stage

ENFORCE = GateConfig()
OBSERVE = GateConfig(evidence=EvidencePolicy.OBSERVE)
GOOD = measured(0.10, tick=5, n=256, se=0.01, skew=0.0)
STALE = Reading(status=Status.STALE, value=0.10, se=0.01, skew=0.0, n=256, tick=1)
WELL = GradientHealth(vanishing=measured(0.1, tick=5, n=2), exploding=measured(0.0, tick=5, n=2))
SOURCE = {
    Gate.G0: Stage.EMPTY,
    Gate.G1: Stage.GERMINATED,
    Gate.G2: Stage.TRAINING,
    Gate.G3: Stage.BLENDING,
    Gate.G5: Stage.HOLDING,
}
INTEGRITY = {
    Gate.G0: ["stage", "legal"],
    Gate.G1: ["stage", "finite", "owned", "as built"],
    Gate.G2: ["stage", "finite", "owned", "as built"],
    Gate.G3: ["stage", "finite", "owned", "as built", "ramp"],
    Gate.G5: ["stage", "finite", "owned", "as built", "alpha"],
}
EVIDENCE = {
    Gate.G0: [],
    Gate.G1: [],
    Gate.G2: ["dwell", "gradient", "contribution"],
    Gate.G3: ["harmless"],
    Gate.G5: ["gradient", "contribution"],
}


def facts(gate: Gate, **changes) -> GateFacts:
    """Facts with which the gate passes."""
    full = gate in (Gate.G3, Gate.G5)
    good = GateFacts(
        stage=SOURCE[gate],
        dwell=9,
        finite=True,
        owned=True,
        degraded=0,
        refusal=None,
        health=WELL,
        gradient_norm=measured(0.5, tick=5, n=10),
        nonfinite_steps=0,
        trainable=True,
        contribution=GOOD,
        contribution_alpha=1.0,
        looks=1,
        max_looks=5,
        alpha=1.0 if full else 0.0,
        ramp_done=full,
    )
    return replace(good, **changes)


def failed(gate: Gate, config: GateConfig = ENFORCE, **changes) -> list[str]:
    result = judge_gate(gate, facts(gate, **changes), config)
    names = [check.name for check in result.checks if not check.passed]
    assert result.passed == (not names) or config is OBSERVE
    assert all(name in result.reason for name in names)
    return names


@pytest.mark.parametrize("gate", list(SOURCE))
def test_a_gate_asks_its_questions_and_passes_on_good_facts(gate):
    result = judge_gate(gate, facts(gate), ENFORCE)
    assert (result.gate, result.passed, result.score, result.reason) == (gate, True, 1.0, "passed")
    assert [check.name for check in result.checks if check.integrity] == INTEGRITY[gate]
    assert [check.name for check in result.checks if not check.integrity] == EVIDENCE[gate]


@pytest.mark.parametrize("gate", list(SOURCE))
@pytest.mark.parametrize("stage", list(Stage))
def test_a_gate_takes_one_stage_only(gate, stage):
    assert failed(gate, stage=stage) == ([] if stage is SOURCE[gate] else ["stage"])


@pytest.mark.parametrize("config", [ENFORCE, OBSERVE], ids=["enforce", "observe"])
@pytest.mark.parametrize(
    ("gate", "changes", "name"),
    [
        (Gate.G0, {"refusal": "budget of live seeds is spent"}, "legal"),
        *((gate, {"finite": False}, "finite") for gate in (Gate.G1, Gate.G2, Gate.G3, Gate.G5)),
        *((gate, {"owned": False}, "owned") for gate in (Gate.G1, Gate.G2, Gate.G3, Gate.G5)),
        *((gate, {"degraded": 1}, "as built") for gate in (Gate.G1, Gate.G2, Gate.G3, Gate.G5)),
        (Gate.G3, {"ramp_done": False}, "ramp"),
        (Gate.G3, {"alpha": 0.5, "contribution_alpha": 0.5}, "ramp"),
        (Gate.G5, {"ramp_done": False}, "alpha"),
        (Gate.G5, {"alpha": 0.99}, "alpha"),
    ],
)
def test_integrity_binds_under_every_policy(gate, changes, name, config):
    result = judge_gate(gate, facts(gate, **changes), config)
    assert not result.passed
    assert [check.name for check in result.checks if not check.passed] == [name]
    assert result.score == pytest.approx(1 - 1 / len(result.checks))


def test_g0_says_which_budget_is_spent():
    assert "budget of FLOPs" in judge_gate(Gate.G0, facts(Gate.G0, refusal="budget of FLOPs: 9 left"), ENFORCE).reason


def test_neither_size_nor_scale_of_the_gradient_nor_a_drifting_host_changes_a_verdict():
    """A hundred times the parameters, or ten times the gradient in each: the norm grows, what was measured does not."""
    for gate in (Gate.G2, Gate.G3, Gate.G5):
        for contribution in (GOOD, measured(0.1, tick=5, n=256, se=0.09, skew=0.0)):
            base = judge_gate(gate, facts(gate, contribution=contribution), ENFORCE)
            for factor in (100**0.5, 10.0, 100.0, 1e6):
                norm = measured(0.5 * factor, tick=5, n=10)
                scaled = judge_gate(gate, facts(gate, contribution=contribution, gradient_norm=norm), ENFORCE)
                assert [(c.name, c.passed) for c in scaled.checks] == [(c.name, c.passed) for c in base.checks]


REFUSED = [
    (Gate.G2, {"contribution": ABSENT}, ["contribution"]),
    (Gate.G2, {"contribution": STALE}, ["contribution"]),
    (Gate.G2, {"contribution": measured(9.0, tick=5, n=256)}, ["contribution"]),  # no standard error, no evidence
    (Gate.G2, {"contribution": measured(9.0, tick=5, n=256, se=0.1)}, ["contribution"]),  # nor without a skewness
    (Gate.G2, {"gradient_norm": ABSENT}, ["gradient"]),
    (Gate.G2, {"gradient_norm": replace(STALE, se=None, skew=None)}, ["gradient"]),
    (Gate.G2, {"gradient_norm": measured(0.0, tick=5, n=10)}, ["gradient"]),
    (Gate.G2, {"health": replace(WELL, vanishing=measured(0.91, tick=5, n=2))}, ["gradient"]),
    (Gate.G2, {"health": replace(WELL, exploding=measured(0.11, tick=5, n=2))}, ["gradient"]),
    (Gate.G5, {"health": replace(WELL, exploding=ABSENT)}, ["gradient"]),
    (Gate.G5, {"health": replace(WELL, vanishing=replace(STALE, se=None, skew=None))}, ["gradient"]),
    (Gate.G2, {"nonfinite_steps": 1}, ["gradient"]),
    (Gate.G2, {"dwell": 2}, ["dwell"]),
    (Gate.G3, {"contribution": ABSENT}, ["harmless"]),
    (Gate.G3, {"contribution": STALE}, ["harmless"]),
    (Gate.G3, {"contribution_alpha": 0.5}, ["harmless"]),
    (Gate.G5, {"contribution": ABSENT}, ["contribution"]),
    (Gate.G5, {"contribution": STALE}, ["contribution"]),
    (Gate.G5, {"gradient_norm": ABSENT}, ["gradient"]),
    (Gate.G5, {"contribution": ABSENT, "gradient_norm": ABSENT}, ["gradient", "contribution"]),
]


@pytest.mark.parametrize(("gate", "changes", "names"), REFUSED)
def test_absent_stale_or_bad_evidence_refuses_and_is_only_told_under_observe(gate, changes, names):
    assert failed(gate, **changes) == names
    told = judge_gate(gate, facts(gate, **changes), OBSERVE)
    assert told.passed
    assert [check.name for check in told.checks if not check.passed] == names
    assert told.score < 1.0
    assert names[0] in told.reason


K, HOLD = ENFORCE.k_se, ENFORCE.hold_k_se
CLOSE = 1e-9


@pytest.mark.parametrize(
    ("gate", "value", "se", "ok"),
    [
        (Gate.G2, K * 0.01 + CLOSE, 0.01, True),
        (Gate.G2, K * 0.01, 0.01, False),
        (Gate.G2, 0.0, 0.0, False),
        (Gate.G2, -1.0, 0.01, False),
        (Gate.G3, -K * 0.01 + CLOSE, 0.01, True),
        (Gate.G3, -K * 0.01 - CLOSE, 0.01, False),
        (Gate.G3, 0.0, 0.0, True),
        (Gate.G5, ENFORCE.min_contribution, ENFORCE.min_contribution / HOLD - CLOSE, True),
        (Gate.G5, ENFORCE.min_contribution - CLOSE, 1e-9, False),
        (Gate.G5, 0.5, 0.5 / HOLD + CLOSE, False),
    ],
)
def test_thresholds_stand_where_the_config_says(gate, value, se, ok):
    names = failed(gate, contribution=measured(value, tick=5, n=256, se=se, skew=0.0))
    assert (names == []) is ok


def test_thresholds_are_config():
    loose = replace(ENFORCE, k_se=0.0, min_contribution=0.0, first_look=1, max_vanishing=1.0)
    weak = facts(
        Gate.G2,
        dwell=1,
        contribution=measured(1e-9, tick=5, n=64, se=1.0, skew=0.0),
        health=replace(WELL, vanishing=measured(1.0, tick=5, n=1)),
    )
    assert judge_gate(Gate.G2, weak, loose).passed
    assert {c.name for c in judge_gate(Gate.G2, weak, ENFORCE).checks if not c.passed} == {
        "dwell",
        "gradient",
        "contribution",
    }


def test_a_seed_without_parameters_needs_no_gradient_and_nothing_else_of_its_size_matters():
    assert failed(Gate.G2, trainable=False, gradient_norm=ABSENT, health=NO_HEALTH) == []
    known = set(GateFacts.__dataclass_fields__)
    assert known == {
        "stage",
        "dwell",
        "finite",
        "owned",
        "degraded",
        "refusal",
        "gradient_norm",
        "health",
        "nonfinite_steps",
        "trainable",
        "contribution",
        "contribution_alpha",
        "looks",
        "max_looks",
        "alpha",
        "ramp_done",
    }


@pytest.mark.parametrize("unknown", ["G6", "g2", 6, -1, "G2 "])
def test_an_unknown_gate_raises_and_names_those_there_are(unknown):
    with pytest.raises(GateError, match=r"unknown gate .*; gates are G0, G1, G2, G3, G5"):
        judge_gate(unknown, facts(Gate.G2), ENFORCE)


@pytest.mark.parametrize("retired", [4, "G4", Gate.G4])
def test_g4_is_retired(retired):
    with pytest.raises(GateError, match="gate G4 is retired"):
        judge_gate(retired, facts(Gate.G2), ENFORCE)


def test_a_gate_is_the_same_by_number_name_and_member():
    assert judge_gate(2, facts(Gate.G2), ENFORCE) == judge_gate("G2", facts(Gate.G2), ENFORCE)
    assert judge_gate(2, facts(Gate.G2), ENFORCE) == judge_gate(Gate.G2, facts(Gate.G2), ENFORCE)


def sample(rng, *, skew: float, n: int = 192) -> list[float]:
    """Gamma differences of a stated skewness, mean 0 and deviation 1."""
    shape = 4.0 / skew**2
    drawn = (rng.gamma(shape, size=n) - shape) / math.sqrt(shape)
    return list(math.copysign(1.0, skew) * drawn)


def reading_of(values: list[float]) -> Reading:
    sums = [math.fsum(v**power for v in values) for power in (1, 2, 3)]
    return estimate_mean(len(values), sums[0], sums[1], total_cube=sums[2], tick=5, min_samples=64)


def hall(values: list[float]) -> float:
    """Hall (1992), equation by equation: t, the sample's skewness g, and the cubic transformation."""
    n, middle = len(values), statistics.fmean(values)
    g = statistics.fmean([(v - middle) ** 3 for v in values]) / statistics.pstdev(values) ** 3
    t = middle / (statistics.stdev(values) / math.sqrt(n))
    return t + g * t**2 / (3 * math.sqrt(n)) + g**2 * t**3 / (27 * n) + g / (6 * math.sqrt(n))


def test_what_the_gate_reads_is_the_smaller_of_t_and_its_correction_for_skewness():
    rng = np.random.default_rng(3)
    for skew in (-3.0, -1.0, 0.01, 1.0, 3.0):
        values = [v + 0.2 for v in sample(rng, skew=skew)]
        reading = reading_of(values)
        t = reading.value / reading.se
        corrected = hall(values)
        assert standard_errors_above_zero(reading) == pytest.approx(min(t, corrected), rel=1e-9)
        assert abs(skew) < 0.5 or (corrected < t) == (skew < 0)


def test_without_skewness_no_correction_and_without_spread_no_doubt():
    assert standard_errors_above_zero(measured(3.0, tick=1, n=64, se=1.0, skew=0.0)) == 3.0
    assert standard_errors_above_zero(measured(0.1, tick=1, n=64, se=0.0, skew=0.0)) == math.inf
    assert standard_errors_above_zero(measured(-0.1, tick=1, n=64, se=0.0, skew=0.0)) == -math.inf
    assert standard_errors_above_zero(measured(0.0, tick=1, n=64, se=0.0, skew=0.0)) == 0.0
    assert standard_errors_above_zero(ABSENT) is None


def test_a_seed_that_helps_by_a_third_of_a_deviation_is_seen_at_most_looks():
    rng = np.random.default_rng(2)
    for skew in (-2.0, 0.01, 2.0):
        passed = 0
        for _ in range(200):
            reading = reading_of([v + 1 / 3 for v in sample(rng, skew=skew)])
            passed += judge_gate(Gate.G2, facts(Gate.G2, contribution=reading), ENFORCE).passed
        assert passed > 170


def test_looks_that_are_spent_are_said_and_leave_only_prune():
    gone = {"looks": 5, "max_looks": 5, "contribution": STALE}
    for gate in (Gate.G2, Gate.G3, Gate.G5):
        result = judge_gate(gate, facts(gate, **gone), ENFORCE)
        assert not result.passed
        assert "5 of 5 looks spent, only PRUNE is left" in result.reason
        assert judge_gate(gate, facts(gate, looks=5, max_looks=5), ENFORCE).passed, (
            "the last look's evidence still counts"
        )
