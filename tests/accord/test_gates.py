"""Gates are pure functions of evidence: what is absent or stale refuses."""

import math
from dataclasses import replace

import pytest

from esper.accord.config import Baseline, EvidencePolicy, GateConfig
from esper.accord.evidence.lasting import LastingHelp
from esper.accord.evidence.record import Weighing
from esper.accord.gates import GateFacts, judge_gate
from esper.leyline.errors import GateError
from esper.leyline.evidence import ABSENT, NO_HEALTH, GradientHealth, Reading, Status, measured
from esper.leyline.stages import Gate, Stage

ENFORCE = GateConfig(baseline=Baseline.CONTINUED)
OBSERVE = GateConfig(evidence=EvidencePolicy.OBSERVE, baseline=Baseline.CONTINUED)
GOOD = measured(0.10, tick=5, n=256, se=0.01, skew=0.0)
STALE = Reading(status=Status.STALE, value=0.10, se=0.01, skew=0.0, n=256, tick=1)
SHOWN = Weighing(log_e=5.0, level=0.01, clusters=512, least=467, void=0)  # log(1 / 0.01) = 4.6
NOT_SHOWN = replace(SHOWN, log_e=-3.0, least=0)
LASTS = LastingHelp(
    tick=5, first=0.1, last=0.09, expected=0.04, lower=0.03, rest=0.05, retry_step=300, clusters=512, ahead=660
)
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
    Gate.G2: ["dwell", "gradient", "contribution", "newest look"],
    Gate.G3: ["harmless"],
    Gate.G5: ["gradient", "contribution", "newest look", "lasting help"],
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
        redundant=None,
        health=WELL,
        gradient_norm=measured(0.5, tick=5, n=10),
        nonfinite_steps=0,
        trainable=True,
        contribution=GOOD,
        contribution_alpha=1.0,
        running=GOOD,
        helps=SHOWN,
        hurts=NOT_SHOWN,
        looks=1,
        max_looks=5,
        lasting=LASTS,
        continuations=1,
        continuing=None,
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
        for helps in (SHOWN, NOT_SHOWN):
            base = judge_gate(gate, facts(gate, helps=helps), ENFORCE)
            for factor in (100**0.5, 10.0, 100.0, 1e6):
                norm = measured(0.5 * factor, tick=5, n=10)
                scaled = judge_gate(gate, facts(gate, helps=helps, gradient_norm=norm), ENFORCE)
                assert [(c.name, c.passed) for c in scaled.checks] == [(c.name, c.passed) for c in base.checks]


REFUSED = [
    (Gate.G5, {"lasting": None, "continuations": 0}, ["lasting help"]),
    (Gate.G5, {"lasting": None}, ["lasting help"]),
    (Gate.G5, {"lasting": replace(LASTS, lower=0.0019)}, ["lasting help"]),
    (Gate.G5, {"lasting": replace(LASTS, rest=0.09)}, ["lasting help"]),
    (Gate.G2, {"contribution": ABSENT}, ["newest look"]),
    (Gate.G2, {"contribution": STALE}, ["newest look"]),
    (Gate.G2, {"helps": None}, ["contribution"]),
    (Gate.G2, {"helps": replace(SHOWN, log_e=None, clusters=29)}, ["contribution"]),
    (Gate.G2, {"running": ABSENT}, ["contribution"]),
    (Gate.G2, {"helps": replace(SHOWN, log_e=None, void=1)}, ["contribution"]),
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
    (Gate.G3, {"running": ABSENT}, ["harmless"]),
    (Gate.G3, {"hurts": None}, ["harmless"]),
    (Gate.G3, {"hurts": replace(NOT_SHOWN, log_e=None)}, ["harmless"]),
    (Gate.G3, {"hurts": replace(NOT_SHOWN, log_e=5.0)}, ["harmless"]),
    (Gate.G5, {"contribution": ABSENT}, ["newest look"]),
    (Gate.G5, {"contribution": STALE}, ["newest look"]),
    (Gate.G5, {"contribution": measured(-1e-9, tick=5, n=128, se=0.01)}, ["newest look"]),
    (Gate.G5, {"helps": None}, ["contribution"]),
    (Gate.G5, {"helps": replace(SHOWN, clusters=466)}, ["contribution"]),
    (Gate.G5, {"gradient_norm": ABSENT}, ["gradient"]),
    (Gate.G5, {"helps": NOT_SHOWN, "gradient_norm": ABSENT}, ["gradient", "contribution"]),
]


@pytest.mark.parametrize(("gate", "changes", "names"), REFUSED)
def test_absent_stale_or_bad_evidence_refuses_and_is_only_told_under_observe(gate, changes, names):
    assert failed(gate, **changes) == names
    told = judge_gate(gate, facts(gate, **changes), OBSERVE)
    assert told.passed
    assert [check.name for check in told.checks if not check.passed] == names
    assert told.score < 1.0
    assert names[0] in told.reason


CLOSE = 1e-9


@pytest.mark.parametrize("gate", [Gate.G2, Gate.G5])
@pytest.mark.parametrize(("beyond", "ok"), [(0.0, True), (CLOSE, True), (-CLOSE, False)])
def test_the_log_evidence_must_reach_the_level(gate, beyond, ok):
    for level in (0.05, 0.0073, 1e-4):
        helps = Weighing(log_e=math.log(1.0 / level) + beyond, level=level, clusters=900, least=0, void=0)
        assert (failed(gate, helps=helps) == []) is ok


def test_what_is_not_evidence_of_help_is_config():
    loose = replace(ENFORCE, first_look=1, max_vanishing=1.0)
    weak = facts(Gate.G2, dwell=1, health=replace(WELL, vanishing=measured(1.0, tick=5, n=1)))
    assert judge_gate(Gate.G2, weak, loose).passed
    assert {c.name for c in judge_gate(Gate.G2, weak, ENFORCE).checks if not c.passed} == {"dwell", "gradient"}


@pytest.mark.parametrize(
    ("helps", "words"),
    [
        (None, "absent: no look yet"),
        (replace(SHOWN, log_e=None, clusters=12), "absent: 12 clusters seen, needs 30"),
        (replace(SHOWN, log_e=None, void=2), "2 of its looks gave no evidence"),
        (replace(SHOWN, clusters=384), "log evidence 5, needs 4.61 at level 0.01 and 467 clusters, has 384"),
        (NOT_SHOWN, "log evidence -3, needs 4.61 at level 0.01"),
    ],
)
def test_the_reason_says_what_is_missing(helps, words):
    reason = judge_gate(Gate.G5, facts(Gate.G5, helps=helps), ENFORCE).reason
    assert words in reason
    assert "contribution: 0.1 ± 0.01 over all looks against 0.002" in reason
    assert reason.endswith("1 of 5 looks drawn")


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
        "redundant",
        "gradient_norm",
        "health",
        "nonfinite_steps",
        "trainable",
        "contribution",
        "contribution_alpha",
        "running",
        "helps",
        "hurts",
        "looks",
        "max_looks",
        "lasting",
        "continuations",
        "continuing",
        "alpha",
        "ramp_done",
    }


@pytest.mark.parametrize("unknown", ["G7", "g2", 7, -1, "G2 "])
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


def test_looks_that_are_spent_are_said_and_leave_only_prune():
    gone = {"looks": 5, "max_looks": 5, "contribution": STALE}
    for gate in (Gate.G2, Gate.G3, Gate.G5):
        result = judge_gate(gate, facts(gate, **gone), ENFORCE)
        assert not result.passed
        assert "5 of 5 looks spent" in result.reason
        assert ("only PRUNE is left" in result.reason) == (gate is Gate.G2), "later on readings go on, ever more seldom"
        assert judge_gate(gate, facts(gate, looks=5, max_looks=5), ENFORCE).passed, (
            "the last look's evidence still counts"
        )


def test_lasting_help_is_asked_of_who_asked_for_it_and_says_when_it_can_be_told() -> None:
    standing = GateConfig(baseline=Baseline.STANDING)
    assert failed(Gate.G5, standing, lasting=None) == []
    (early,) = [
        check.detail
        for check in judge_gate(Gate.G5, facts(Gate.G5, lasting=replace(LASTS, rest=0.2)), ENFORCE).checks
        if check.name == "lasting help"
    ]
    assert "the host is still to gain 0.2 by itself" in early
    assert early.endswith("1 of 3 continuations, too early to tell before step 300")
    spent = judge_gate(Gate.G5, facts(Gate.G5, lasting=replace(LASTS, lower=0.001), continuations=3), ENFORCE).reason
    assert spent.endswith("3 of 3 continuations, only PRUNE is left")


def test_a_seed_that_a_layer_could_learn_is_no_fossil_whatever_is_enforced():
    for config in (ENFORCE, OBSERVE):
        result = judge_gate(Gate.G5, facts(Gate.G5, redundant="lora folds into stem"), config)
        assert (result.passed, result.reason) == (False, "function: lora folds into stem")
