"""Gates: pure functions of evidence, the same for every caller.

    G0 germinate            slot empty, blueprint known, budgets left
    G1 -> TRAINING          seed finite and owned by an optimizer group on every rank
    G2 -> BLENDING          gradients measured and healthy, and a paired probe shows that the seed helps
    G3 -> HOLDING           ramp complete at full target, finite, owned, and not hurting at the present alpha
    G5 -> FOSSILIZED        contribution above a threshold and above k standard errors, finite, owned

*Integrity* checks bind every controller. *Evidence* checks bind if ``gates.evidence`` is enforce; under observe they
are only measured and logged. A gate refuses on absent or stale evidence and never reads it as zero. A seed's size and
architecture do not enter the verdict.

contribution = mean over paired samples of loss(without) - loss(with), in nats; positive helps.

Differences of losses are skewed. A seed that helps a little on most samples and hurts a lot on a few has a long lower
tail, and then Student's t says "better" by luck far too often, since a look that misses those few samples sees only
help. So a gate that asks whether a seed helps takes the smaller of t and its skewness-corrected form (Hall, 1992, "On
the removal of skewness by transformation", J. R. Statist. Soc. B 54):

    t = mean / SE,   a = skew / (3 sqrt(n)),   corrected = ((1 + a t)^3 - 1) / (3 a) + a / 2

docs/gates.md says how often a seed passes by luck, and how the defaults of ``k_se`` and ``hold_k_se`` follow from it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from esper.accord.config import EvidencePolicy, GateConfig
from esper.leyline.evidence import Check, GateResult, GradientHealth, Reading
from esper.leyline.stages import Gate, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class GateFacts:
    """The facts of one slot at one tick that a gate judges, agreed by all ranks.

    Fields:
        stage: present stage.
        dwell: ticks in this stage.
        finite: whether the seed's parameters are finite on every rank.
        owned: whether each of the seed's parameters is in exactly one optimizer group on every rank.
        degraded: number of ranks on which the seed runs by a fallback taken at run time.
        refusal: why a germination is not legal (slot taken, unknown blueprint, spent budget), or None.
        gradient_norm: mean L2 norm of the seed's gradient since the last tick.
        health: health of the seed's gradient, as shares of its parameters, which do not depend on its size.
        nonfinite_steps: steps since the last tick with a non-finite gradient.
        trainable: whether the seed has parameters at all (noop has none and needs no gradient evidence).
        contribution: paired evidence.
        contribution_alpha: alpha at which ``contribution`` was measured.
        looks: looks of this life spent on the gate.
        max_looks: looks that a life has for the gate.
        alpha: present alpha.
        ramp_done: whether the committed ramp has reached its target.
    """

    stage: Stage
    dwell: int
    finite: bool
    owned: bool
    degraded: int
    refusal: str | None
    gradient_norm: Reading
    health: GradientHealth
    nonfinite_steps: int
    trainable: bool
    contribution: Reading
    contribution_alpha: float
    looks: int
    max_looks: int
    alpha: float
    ramp_done: bool


Rule = Callable[[GateFacts, GateConfig], list[Check]]


def _integrity(name: str, passed: bool, detail: str) -> Check:
    return Check(name, passed, detail, integrity=True)


def _evidence(name: str, passed: bool, detail: str) -> Check:
    return Check(name, passed, detail, integrity=False)


def _check_integrity(facts: GateFacts, stage: Stage) -> list[Check]:
    return [
        _integrity("stage", facts.stage is stage, f"is {facts.stage.name}, needs {stage.name}"),
        _integrity("finite", facts.finite, "the seed holds Inf or NaN on some rank"),
        _integrity("owned", facts.owned, "some parameter stands in no optimizer group on some rank"),
        _integrity("as built", facts.degraded == 0, f"runs by a fallback on {facts.degraded} ranks"),
    ]


def _check_gradient(facts: GateFacts, config: GateConfig) -> Check:
    norm = facts.gradient_norm
    if not facts.trainable:
        return _evidence("gradient", True, "nothing to train")
    vanishing, exploding = facts.health.vanishing, facts.health.exploding
    norm_ok = norm.is_measured and norm.value is not None and norm.value > 0.0 and facts.nonfinite_steps == 0
    vanishing_ok = vanishing.is_measured and vanishing.value is not None and vanishing.value <= config.max_vanishing
    exploding_ok = exploding.is_measured and exploding.value is not None and exploding.value <= config.max_exploding
    readings = f"norm {norm}, vanishing {vanishing}, exploding {exploding}, {facts.nonfinite_steps} non-finite steps"
    needs = f"needs a measured norm > 0, shares up to {config.max_vanishing:g} and {config.max_exploding:g}"
    return _evidence("gradient", norm_ok and vanishing_ok and exploding_ok, f"{readings}; {needs}")


def standard_errors_above_zero(reading: Reading) -> float | None:
    """Returns by how many standard errors a mean is above zero, corrected for skewness.

    It is the smaller of t and Hall's transformation of t (see the module); None without value, error or skewness.
    """
    if reading.value is None or reading.se is None or reading.skew is None:
        return None
    if reading.se == 0.0:
        return math.copysign(math.inf, reading.value) if reading.value else 0.0
    t = reading.value / reading.se
    a = reading.skew / (3.0 * math.sqrt(reading.n))
    return min(t, t + a * t * t + a * a * t**3 / 3.0 + a / 2.0)


def _describe_spent_looks(facts: GateFacts) -> str:
    if facts.looks < facts.max_looks or facts.contribution.is_measured:
        return ""
    return f"; {facts.looks} of {facts.max_looks} looks spent, only PRUNE is left"


def _check_contribution(facts: GateFacts, k_se: float, floor: float) -> Check:
    reading = facts.contribution
    above = standard_errors_above_zero(reading)
    text = f"contribution {reading} at alpha {facts.contribution_alpha:g}"
    if above is not None:
        text += f", {above:.3g} SE after skewness"
    text += f"; needs > {k_se:g} SE"
    if floor > 0:
        text += f" and >= {floor:g}"
    text += _describe_spent_looks(facts)
    if not reading.is_measured or reading.value is None or above is None:
        return _evidence("contribution", False, text)
    return _evidence("contribution", above > k_se and reading.value >= floor, text)


def _g0(facts: GateFacts, config: GateConfig) -> list[Check]:
    return [
        _integrity("stage", facts.stage is Stage.EMPTY, f"is {facts.stage.name}, needs EMPTY"),
        _integrity("legal", facts.refusal is None, facts.refusal or "legal"),
    ]


def _g1(facts: GateFacts, config: GateConfig) -> list[Check]:
    return _check_integrity(facts, Stage.GERMINATED)


def _g2(facts: GateFacts, config: GateConfig) -> list[Check]:
    return [
        *_check_integrity(facts, Stage.TRAINING),
        _evidence("dwell", facts.dwell >= config.first_look, f"{facts.dwell} of {config.first_look} ticks"),
        _check_gradient(facts, config),
        _check_contribution(facts, config.k_se, 0.0),
    ]


def _g3(facts: GateFacts, config: GateConfig) -> list[Check]:
    reading = facts.contribution
    detail = f"contribution {reading} at alpha {facts.contribution_alpha:g}; needs >= -{config.k_se:g} SE"
    detail += _describe_spent_looks(facts)
    harmless = (
        reading.is_measured
        and reading.value is not None
        and reading.se is not None
        and facts.contribution_alpha == facts.alpha
        and reading.value >= -config.k_se * reading.se
    )
    return [
        *_check_integrity(facts, Stage.BLENDING),
        _integrity(
            "ramp", facts.ramp_done and facts.alpha == 1.0, f"alpha {facts.alpha:g}, needs a finished ramp to 1"
        ),
        _evidence("harmless", harmless, detail),
    ]


def _g5(facts: GateFacts, config: GateConfig) -> list[Check]:
    full = facts.ramp_done and facts.alpha == 1.0
    return [
        *_check_integrity(facts, Stage.HOLDING),
        _integrity("alpha", full, f"alpha {facts.alpha:g}, needs 1 at rest"),
        _check_gradient(facts, config),
        _check_contribution(facts, config.hold_k_se, config.min_contribution),
    ]


_RULES: dict[Gate, Rule] = {Gate.G0: _g0, Gate.G1: _g1, Gate.G2: _g2, Gate.G3: _g3, Gate.G5: _g5}

if set(_RULES) != set(Gate) - {Gate.G4}:
    raise AssertionError(f"gates without a rule: {set(Gate) - {Gate.G4} - set(_RULES)}")


def judge_gate(gate: Gate | int | str, facts: GateFacts, config: GateConfig) -> GateResult:
    """Returns the verdict of a gate.

    Raises:
        GateError: the gate is unknown or retired.
    """
    gate = Gate.of(gate)
    checks = tuple(_RULES[gate](facts, config))
    binding = [c for c in checks if c.integrity or config.evidence == EvidencePolicy.ENFORCE]
    passed = all(check.passed for check in binding)
    return GateResult(gate=gate, passed=passed, score=sum(c.passed for c in checks) / len(checks), checks=checks)
