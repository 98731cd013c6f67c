"""Features of one slot."""

import math

from esper.leyline.alpha import AlphaMode, Curve, Operator
from esper.leyline.stages import Stage
from esper.tamiyo.policy.columns import (
    FLAGS,
    GAIN,
    HEALTH,
    REACH,
    SHARE,
    SIZE,
    Sight,
    Table,
    Values,
    count,
    find_info,
    flags,
    gain,
    health,
    kind_of,
    optional,
    share,
    size,
)

SLOT = Table("slot")
STAGES = (
    Stage.EMPTY,
    Stage.GERMINATED,
    Stage.TRAINING,
    Stage.BLENDING,
    Stage.HOLDING,
    Stage.FOSSILIZED,
    Stage.PRUNED,
    Stage.EMBARGOED,
    Stage.RESETTING,
)
OPERATORS = (Operator.ADD, Operator.MULTIPLY, Operator.GATE, Operator.CONFIDENCE, Operator.CHANNEL)
CURVES = (Curve.LINEAR, Curve.COSINE, Curve.SIGMOID)
MODES = (AlphaMode.HOLD, AlphaMode.UP, AlphaMode.DOWN)

LEFT_OUT = {
    "slot": "a name; `place` says where it is",
    "gradient_norm": "in the host's units it is `gradient_ratio`",
    "gradient_parity": "`gradient_ratio` by another scale, which the shipped policy was not taught",
    "update_parity": "for people; the shipped policy was not taught it",
}


def _names(members: tuple[Stage | Operator | Curve | AlphaMode, ...]) -> tuple[str, ...]:
    return tuple(member.name.lower() for member in members)


@SLOT.add("place", ("row", "col"), reads=("row", "col"))
def _place(s: Sight) -> Values:
    """Row and column."""
    return s.slot.row, s.slot.col


@SLOT.add("stage", (*_names(STAGES), "staged"), reads=("stage", "staged"))
def _stage(s: Sight) -> Values:
    """Stage, and whether a germination waits for its second tick."""
    stage = s.slot.stage
    return *[float(stage is one) for one in STAGES], float(s.slot.staged)


@SLOT.add("dwell", ("done", "left"), reads=("dwell", "min_dwell"))
def _dwell(s: Sight) -> Values:
    """Ticks in this stage, and those until the next is legal."""
    return count(s.slot.dwell), count(max(0, s.slot.min_dwell - s.slot.dwell))


@SLOT.add("generation", ("count",))
def _generation(s: Sight) -> Values:
    """Births so far."""
    return (count(s.slot.generation),)


@SLOT.add("blueprint", (*SIZE, *REACH, "known", "unknown", "none"), reads=("blueprint", "catalogue"))
def _blueprint(s: Sight) -> Values:
    """What the living seed is: its size beside the host, what it mixes; whether it is in the catalogue."""
    info = find_info(s.slot)
    if info is not None:
        return *kind_of(info, s.run), 1.0, 0.0, 0.0
    return *((0.0,) * (len(SIZE) + len(REACH))), 0.0, float(s.slot.blueprint is not None), float(not s.slot.blueprint)


@SLOT.add("operator", (*_names(OPERATORS), "none"))
def _operator(s: Sight) -> Values:
    """Operator in force or to come."""
    operator = s.slot.operator
    return *[float(operator is one) for one in OPERATORS], float(operator is None)


@SLOT.add("operators", _names(OPERATORS))
def _operators(s: Sight) -> Values:
    """Operators that the slot may use."""
    usable = s.slot.operators
    return tuple(float(one in usable) for one in OPERATORS)


@SLOT.add("channel", ("mean", "p95", "sparsity", "known"))
def _channel(s: Sight) -> Values:
    """Summary of CHANNEL's vector."""
    told = s.slot.channel
    return (0.0, 0.0, 0.0, 0.0) if told is None else (told.mean, told.p95, told.sparsity, 1.0)


@SLOT.add("curve", (*_names(CURVES), "none"))
def _curve(s: Sight) -> Values:
    """Curve of the birth command."""
    curve = s.slot.curve
    return *[float(curve is one) for one in CURVES], float(curve is None)


@SLOT.add(
    "alpha",
    ("now", "target", "velocity", "progress", *_names(MODES), "ending"),
    reads=("alpha", "alpha_target", "alpha_velocity", "ramp_progress", "alpha_mode", "ending"),
)
def _alpha(s: Sight) -> Values:
    """Alpha, where it goes and how fast, the ramp's progress, its direction, whether it is a prune."""
    v = s.slot
    mode = [float(v.alpha_mode is one) for one in MODES]
    return v.alpha, v.alpha_target, v.alpha_velocity, v.ramp_progress, *mode, float(v.ending)


@SLOT.add("parameters", ("of_host",))
def _parameters(s: Sight) -> Values:
    """Parameters of the seed beside the host's."""
    return (size(s.slot.parameters, s.run.host.parameters),)


@SLOT.add("contribution", (*GAIN, "at_alpha"), reads=("contribution", "contribution_alpha"))
def _contribution(s: Sight) -> Values:
    """What the latest look says the seed saves, and at which alpha it looked."""
    return *gain(s.slot.contribution, s), s.slot.contribution_alpha


@SLOT.add("running", GAIN)
def _running(s: Sight) -> Values:
    """What all looks together say it saves."""
    return gain(s.slot.running, s)


@SLOT.add(
    "evidence",
    ("helps", "helps_known", "hurts", "hurts_known", "level", "level_known"),
    reads=("helps", "hurts", "level"),
)
def _evidence(s: Sight) -> Values:
    """Share of the evidence that would show that it helps, that it hurts; the chance of luck that it is allowed."""
    helps, hurts = s.slot.helps, s.slot.hurts
    level = None if s.slot.level is None else 1.0 + math.log10(max(s.slot.level, 1e-6)) / 3.0
    told = (None if helps is None else math.asinh(helps), None if hurts is None else math.asinh(hurts), level)
    return tuple(number for one in told for number in optional(one))


@SLOT.add("looks", ("drawn", "left"), reads=("looks", "max_looks"))
def _looks(s: Sight) -> Values:
    """Looks drawn and left."""
    return count(s.slot.looks), count(max(0, s.slot.max_looks - s.slot.looks))


@SLOT.add("lasting", GAIN)
def _lasting(s: Sight) -> Values:
    """Least help to be expected beside a host that goes on training."""
    return gain(s.slot.lasting, s)


@SLOT.add("continuations", ("done", "left"), reads=("continuations", "max_continuations"))
def _continuations(s: Sight) -> Values:
    """Continuations in copies, done and left."""
    done, most = s.slot.continuations, s.slot.max_continuations
    return count(done), count(max(0, most - done))


@SLOT.add("worth", tuple(f"{kind}_{column}" for kind in ("solo", "left_out", "shared") for column in GAIN))
def _worth(s: Sight) -> Values:
    """What it saves alone, what the others rely on it for, and its share."""
    worth = s.slot.worth
    return *gain(worth.solo, s), *gain(worth.leave_one_out, s), *gain(worth.shapley, s)


@SLOT.add(
    "gate",
    tuple(f"{kind}_{column}" for kind in ("mean", "std", "effective") for column in SHARE),
    reads=("gate_mean", "gate_std", "effective_alpha"),
)
def _gate(s: Sight) -> Values:
    """Mean and spread of a gate over samples, and alpha times its mean."""
    return *share(s.slot.gate_mean), *share(s.slot.gate_std), *share(s.slot.effective_alpha)


@SLOT.add("gradient_ratio", ("log", *FLAGS))
def _gradient_ratio(s: Sight) -> Values:
    """Norm of the seed's gradient over the host's, as a logarithm."""
    reading = s.slot.gradient_ratio
    return math.log10(reading.value) if reading.value else 0.0, *flags(reading)


@SLOT.add("health", (*HEALTH, "nonfinite_steps", "degraded"), reads=("health", "nonfinite_steps", "degraded"))
def _health(s: Sight) -> Values:
    """Vanishing, exploding and broken gradients of the seed; ranks on which it runs by a fallback."""
    return *health(s.slot.health), count(s.slot.nonfinite_steps), count(s.slot.degraded)


@SLOT.add("verdict", ("passed", "score", "broken", "known"))
def _verdict(s: Sight) -> Values:
    """Verdict of the gate ahead: passed, share of its checks, share of those that bind everybody and failed."""
    told = s.slot.verdict
    if told is None:
        return 0.0, 0.0, 0.0, 0.0
    broken = sum(check.integrity and not check.passed for check in told.checks)
    return float(told.passed), told.score, broken / max(1, len(told.checks)), 1.0


@SLOT.add("embargo_left", ("ticks", "on_trial"), reads=("embargo_left", "slot"))
def _embargo_left(s: Sight) -> Values:
    """Ticks until a seed may germinate here again; whether this slot's seed is the one on trial."""
    return count(s.slot.embargo_left), float(s.run.breaker.on_trial == s.slot.slot)


@SLOT.add("tried", ("births", "failures", "blueprints"), reads=("catalogue",))
def _tried(s: Sight) -> Values:
    """Seeds that lived here and those that are gone, as seen; the number of blueprints that fit."""
    memory = s.memory.slots[s.slot.slot]
    return count(sum(memory.births.values())), count(sum(memory.failures.values())), count(len(s.slot.catalogue))


for _shown, _all in ((STAGES, Stage), (OPERATORS, Operator), (CURVES, Curve), (MODES, AlphaMode)):
    assert set(_shown) == set(_all), f"{_all}: a member without a column; add a feature, keep the old one"
