"""Gates: pure functions of evidence, the same for every caller.

    G0 germinate            slot empty, blueprint known, budgets left
    G1 -> TRAINING          seed finite and owned by an optimizer group on every rank
    G2 -> BLENDING          gradients measured and healthy, and the running evidence shows that the seed helps
    G3 -> HOLDING           ramp complete at full target, finite, owned, and not shown to hurt at the present alpha
    G5 -> FOSSILIZED        the running evidence shows a contribution above a threshold, at the level of the birth, and
                            the newest look does not speak against it; copies that are trained on with and without
                            the seed show that the help lasts; finite, owned, and no layer of the host could learn it
    G6 fossil prunable      the running evidence since it became a fossil shows that the network is better without it,
                            and the newest look agrees; binds every controller, whatever ``gates.evidence``

*Integrity* checks bind every controller. *Evidence* checks bind if ``gates.evidence`` is enforce; under observe they
are only measured and logged. A gate refuses on absent or stale evidence and never reads it as zero. A seed's size and
architecture do not enter the verdict.

contribution = mean over paired samples of loss(without) - loss(with), in nats; positive helps.

Looks of a life add up: what is judged is the sum over all of them since alpha last moved, by a bound that is valid at
any time (`esper.accord.evidence`). A fresh reading of the newest look is asked for besides. docs/gates.md says how
often a seed passes by luck.
"""

from collections.abc import Callable
from dataclasses import dataclass

from esper.accord.config import Baseline, EvidencePolicy, GateConfig
from esper.accord.evidence.lasting import COPIES, LastingHelp
from esper.accord.evidence.record import Weighing
from esper.accord.evidence.sums import MIN_CLUSTERS
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
        redundant: why the living seed adds nothing that the host could not learn by itself, or None.
        gradient_norm: mean L2 norm of the seed's gradient since the last tick.
        health: health of the seed's gradient, as shares of its parameters, which do not depend on its size.
        nonfinite_steps: steps since the last tick with a non-finite gradient.
        trainable: whether the seed has parameters at all (noop has none and needs no gradient evidence).
        contribution: paired evidence of the newest look alone.
        contribution_alpha: alpha at which ``contribution`` was measured.
        running: paired evidence of all looks since alpha last moved.
        helps: what the running evidence says to "it helps"; None before the first look.
        hurts: what it says to "it hurts".
        looks: looks that this life has drawn.
        max_looks: looks that a life may have drawn by the end of this stage.
        lasting: what the latest continuation in copies said; None before the first one, or if it gave no evidence.
        continuations: continuations of this life.
        continuing: steps that the copies of the continuation under way have taken; None if there is none.
        alpha: present alpha.
        ramp_done: whether the committed ramp has reached its target.
    """

    stage: Stage
    dwell: int
    finite: bool
    owned: bool
    degraded: int
    refusal: str | None
    redundant: str | None
    gradient_norm: Reading
    health: GradientHealth
    nonfinite_steps: int
    trainable: bool
    contribution: Reading
    contribution_alpha: float
    running: Reading
    helps: Weighing | None
    hurts: Weighing | None
    looks: int
    max_looks: int
    lasting: LastingHelp | None
    continuations: int
    continuing: int | None
    alpha: float
    ramp_done: bool


Rule = Callable[[GateFacts, GateConfig], list[Check]]


def _integrity(name: str, passed: bool, detail: str) -> Check:
    return Check(name, passed, detail, integrity=True)


def _evidence(name: str, passed: bool, detail: str) -> Check:
    return Check(name, passed, detail, integrity=False)


_OWNED = "every parameter stands in an optimizer group"
_NOT_OWNED = "some parameter stands in no optimizer group on some rank"


def _check_integrity(facts: GateFacts, stage: Stage) -> list[Check]:
    return [
        _integrity("stage", facts.stage is stage, f"is {facts.stage.name}, needs {stage.name}"),
        _integrity(
            "finite", facts.finite, "no Inf or NaN" if facts.finite else "the seed holds Inf or NaN on some rank"
        ),
        _integrity("owned", facts.owned, _OWNED if facts.owned else _NOT_OWNED),
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


def _describe_looks(facts: GateFacts) -> str:
    if facts.looks < facts.max_looks:
        return f"{facts.looks} of {facts.max_looks} looks drawn"
    spent = f"{facts.looks} of {facts.max_looks} looks spent"
    last = facts.stage is Stage.TRAINING and not facts.contribution.is_measured
    return f"{spent}, only PRUNE is left" if last else spent


def _describe_weighing(weighing: Weighing) -> str:
    if weighing.void:
        return f"{weighing.void} of its looks gave no evidence"
    if weighing.log_e is None:
        return f"absent: {weighing.clusters} clusters seen, needs {MIN_CLUSTERS}"
    few = ""
    if weighing.clusters < weighing.least:
        few = f" and {weighing.least} clusters, has {weighing.clusters}"
    return f"log evidence {weighing.log_e:.3g}, needs {weighing.needed:.3g} at level {weighing.level:.3g}{few}"


def _check_contribution(facts: GateFacts, floor: float) -> Check:
    """Whether the running evidence shows a mean difference above ``floor`` nats."""
    weighing = facts.helps
    says = "absent: no look yet" if weighing is None else _describe_weighing(weighing)
    text = f"{facts.running} over all looks against {floor:g}; {says}; {_describe_looks(facts)}"
    shown = facts.running.value is not None and weighing is not None and weighing.passed
    return _evidence("contribution", shown, text)


def _check_newest(facts: GateFacts) -> Check:
    """Whether the newest look is fresh and does not speak against the seed."""
    newest = facts.contribution
    for_it = newest.is_measured and newest.value is not None and newest.value > 0.0
    detail = f"{newest} at alpha {facts.contribution_alpha:g}; needs a fresh one > 0; {_describe_looks(facts)}"
    return _evidence("newest look", for_it, detail)


def _check_lasting(facts: GateFacts, config: GateConfig) -> list[Check]:
    """Whether the help is expected to be there at the end, beside a host that goes on training."""
    if config.baseline is Baseline.STANDING:
        return []
    if facts.continuing is not None:
        under_way = f"continuation {facts.continuations + 1} of {config.continuations} is under way"
        text = f"not yet: {under_way}, {facts.continuing} of {COPIES * config.continue_steps} steps of its copies done"
        return [_evidence("lasting help", False, text)]
    spent = f"{facts.continuations} of {config.continuations} continuations"
    if facts.lasting is None:
        text = f"absent: {spent} gave no evidence" if facts.continuations else "not continued in copies yet"
        return [_evidence("lasting help", False, text)]
    enough = facts.lasting.lower >= config.min_contribution and not facts.lasting.is_early
    only = "" if enough or facts.continuations < config.continuations else ", only PRUNE is left"
    if facts.lasting.is_early:
        only += f", too early to tell before step {facts.lasting.retry_step}"
    text = f"{facts.lasting}; needs {config.min_contribution:g} and more than that; {spent}{only}"
    return [_evidence("lasting help", enough, text)]


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
        _check_contribution(facts, 0.0),
        _check_newest(facts),
    ]


def _g3(facts: GateFacts, config: GateConfig) -> list[Check]:
    hurts, newest = facts.hurts, facts.contribution
    says = "absent: no look yet" if hurts is None else _describe_weighing(hurts)
    detail = (
        f"contribution {facts.running} over all looks, newest {newest} at alpha {facts.contribution_alpha:g}; "
        f"that it hurts: {says}; needs less, and a fresh look; {_describe_looks(facts)}"
    )
    harmless = (
        newest.is_measured
        and facts.contribution_alpha == facts.alpha
        and facts.running.value is not None
        and hurts is not None
        and hurts.log_e is not None
        and not hurts.passed
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
    redundant = [] if facts.redundant is None else [_integrity("function", False, facts.redundant)]
    return [
        *_check_integrity(facts, Stage.HOLDING),
        *redundant,
        _integrity("alpha", full, f"alpha {facts.alpha:g}, needs 1 at rest"),
        _check_gradient(facts, config),
        _check_contribution(facts, config.min_contribution),
        _check_newest(facts),
        *_check_lasting(facts, config),
    ]


def _g6(facts: GateFacts, config: GateConfig) -> list[Check]:
    # Integrity in name: what was shown to help is taken out on evidence alone, also by those who grow without any.
    hurts, newest = facts.hurts, facts.contribution
    says = "absent: no look since it became a fossil" if hurts is None else _describe_weighing(hurts)
    detail = f"contribution {facts.running} since it became a fossil; that it hurts: {says}"
    against = newest.is_measured and newest.value is not None and newest.value < 0.0
    return [
        _integrity("stage", facts.stage is Stage.FOSSILIZED, f"is {facts.stage.name}, needs FOSSILIZED"),
        _integrity("harm", hurts is not None and hurts.passed, detail),
        _integrity("newest look", against, f"{newest}; needs a fresh one < 0"),
    ]


_RULES: dict[Gate, Rule] = {Gate.G0: _g0, Gate.G1: _g1, Gate.G2: _g2, Gate.G3: _g3, Gate.G5: _g5, Gate.G6: _g6}

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
