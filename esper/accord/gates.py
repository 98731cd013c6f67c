"""Gates: pure functions of evidence, one service for every caller.

    G0 germinate            slot empty, blueprint known, budgets left
    G1 -> TRAINING          seed finite and owned by an optimizer group on every rank
    G2 -> BLENDING          gradients measured and healthy, and a paired probe shows that the seed helps
    G3 -> HOLDING           ramp complete at full target, finite, owned, and not hurting at the present alpha
    G5 -> FOSSILIZED        contribution above a threshold and above k standard errors, finite, owned

*Integrity* checks bind every controller. *Evidence* checks bind where ``gates.evidence`` is enforce; under observe
they are measured and logged. Evidence that is absent or stale is refused, never read as zero. A seed's size and
architecture do not enter the verdict.

contribution = mean over paired samples of loss(without) - loss(with), in nats; positive helps.

Differences of losses are skewed. A seed that helps a little on most samples and hurts much on a few shows a long lower
tail, and then Student's t says "better" by luck far too often: a look that misses the few sees only help. So a gate
that asks whether a seed helps takes the smaller of t and its skewness-corrected form (Hall, 1992, "On the removal of
skewness by transformation", J. R. Statist. Soc. B 54):

    t = mean / SE,   a = skew / (3 sqrt(n)),   corrected = ((1 + a t)^3 - 1) / (3 a) + a / 2

How often luck passes, and how the defaults of ``k_se`` and ``hold_k_se`` follow from it, is in docs/gates.md.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from esper.accord.config import EvidencePolicy, GateConfig
from esper.leyline.evidence import Check, GateResult, GradientHealth, Reading
from esper.leyline.stages import Gate, Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class GateFacts:
    """What is known of one slot at one tick, agreed by all ranks.

    Fields:
        stage, dwell: where it is, for how many ticks.
        finite, owned: on every rank the seed's parameters are finite, and each stands in exactly one optimizer group.
        degraded: ranks on which it runs by a fallback taken at run time.
        refusal: why a germination is not legal (slot taken, unknown blueprint, spent budget), or None.
        gradient_norm: mean L2 norm since the last tick. health: shares of its parameters, no size of anything.
        nonfinite_steps: steps with a non-finite gradient.
        trainable: the seed has parameters at all (noop has none and needs no gradient evidence).
        contribution, contribution_alpha: paired evidence and the alpha it was measured at.
        looks, max_looks: looks of this life spent on the gate, and how many there are.
        alpha, ramp_done: present alpha; the committed ramp has reached its target.
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


def _sound(facts: GateFacts, stage: Stage) -> list[Check]:
    return [
        _integrity("stage", facts.stage is stage, f"is {facts.stage.name}, needs {stage.name}"),
        _integrity("finite", facts.finite, "the seed holds Inf or NaN on some rank"),
        _integrity("owned", facts.owned, "some parameter stands in no optimizer group on some rank"),
        _integrity("as built", facts.degraded == 0, f"runs by a fallback on {facts.degraded} ranks"),
    ]


def _healthy(facts: GateFacts, config: GateConfig) -> Check:
    norm = facts.gradient_norm
    if not facts.trainable:
        return _evidence("gradient", True, "nothing to train")
    vanishing, exploding = facts.health.vanishing, facts.health.exploding
    moves = norm.is_measured and norm.value is not None and norm.value > 0.0 and facts.nonfinite_steps == 0
    lives = vanishing.is_measured and vanishing.value is not None and vanishing.value <= config.max_vanishing
    calm = exploding.is_measured and exploding.value is not None and exploding.value <= config.max_exploding
    told = f"norm {norm}, vanishing {vanishing}, exploding {exploding}, {facts.nonfinite_steps} non-finite steps"
    wanted = f"needs a measured norm > 0, shares up to {config.max_vanishing:g} and {config.max_exploding:g}"
    return _evidence("gradient", moves and lives and calm, f"{told}; {wanted}")


def standard_errors_above_zero(reading: Reading) -> float | None:
    """By how many standard errors a mean is above zero, corrected for skewness; None without value, error or skewness.

    The smaller of t and Hall's transformation of it (see the module).
    """
    if reading.value is None or reading.se is None or reading.skew is None:
        return None
    if reading.se == 0.0:
        return math.copysign(math.inf, reading.value) if reading.value else 0.0
    t = reading.value / reading.se
    a = reading.skew / (3.0 * math.sqrt(reading.n))
    return min(t, t + a * t * t + a * a * t**3 / 3.0 + a / 2.0)


def _spent(facts: GateFacts) -> str:
    gone = facts.looks >= facts.max_looks and not facts.contribution.is_measured
    return f"; {facts.looks} of {facts.max_looks} looks spent, only PRUNE is left" if gone else ""


def _helps(facts: GateFacts, k_se: float, floor: float) -> Check:
    reading = facts.contribution
    above = standard_errors_above_zero(reading)
    text = f"contribution {reading} at alpha {facts.contribution_alpha:g}"
    text += "" if above is None else f", {above:.3g} SE after skewness"
    text += f"; needs > {k_se:g} SE" + (f" and >= {floor:g}" if floor > 0 else "") + _spent(facts)
    if not reading.is_measured or reading.value is None or above is None:
        return _evidence("contribution", False, text)
    return _evidence("contribution", above > k_se and reading.value >= floor, text)


def _g0(facts: GateFacts, config: GateConfig) -> list[Check]:
    return [
        _integrity("stage", facts.stage is Stage.EMPTY, f"is {facts.stage.name}, needs EMPTY"),
        _integrity("legal", facts.refusal is None, facts.refusal or "legal"),
    ]


def _g1(facts: GateFacts, config: GateConfig) -> list[Check]:
    return _sound(facts, Stage.GERMINATED)


def _g2(facts: GateFacts, config: GateConfig) -> list[Check]:
    dwelt = _evidence("dwell", facts.dwell >= config.first_look, f"{facts.dwell} of {config.first_look} ticks")
    return [*_sound(facts, Stage.TRAINING), dwelt, _healthy(facts, config), _helps(facts, config.k_se, 0.0)]


def _g3(facts: GateFacts, config: GateConfig) -> list[Check]:
    reading = facts.contribution
    detail = f"contribution {reading} at alpha {facts.contribution_alpha:g}; needs >= -{config.k_se:g} SE"
    detail += _spent(facts)
    harmless = (
        reading.is_measured
        and reading.value is not None
        and reading.se is not None
        and facts.contribution_alpha == facts.alpha
        and reading.value >= -config.k_se * reading.se
    )
    return [
        *_sound(facts, Stage.BLENDING),
        _integrity(
            "ramp", facts.ramp_done and facts.alpha == 1.0, f"alpha {facts.alpha:g}, needs a finished ramp to 1"
        ),
        _evidence("harmless", harmless, detail),
    ]


def _g5(facts: GateFacts, config: GateConfig) -> list[Check]:
    full = facts.ramp_done and facts.alpha == 1.0
    return [
        *_sound(facts, Stage.HOLDING),
        _integrity("alpha", full, f"alpha {facts.alpha:g}, needs 1 at rest"),
        _healthy(facts, config),
        _helps(facts, config.hold_k_se, config.min_contribution),
    ]


_RULES: dict[Gate, Rule] = {Gate.G0: _g0, Gate.G1: _g1, Gate.G2: _g2, Gate.G3: _g3, Gate.G5: _g5}

if set(_RULES) != set(Gate) - {Gate.G4}:
    raise AssertionError(f"gates without a rule: {set(Gate) - {Gate.G4} - set(_RULES)}")


def judge_gate(gate: Gate | int | str, facts: GateFacts, config: GateConfig) -> GateResult:
    """Returns the verdict of a gate.

    Raises:
        GateError: unknown or retired gate.
    """
    gate = Gate.of(gate)
    checks = tuple(_RULES[gate](facts, config))
    binding = [c for c in checks if c.integrity or config.evidence == EvidencePolicy.ENFORCE]
    passed = all(check.passed for check in binding)
    return GateResult(gate=gate, passed=passed, score=sum(c.passed for c in checks) / len(checks), checks=checks)
