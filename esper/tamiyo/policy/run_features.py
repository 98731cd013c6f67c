"""Features of the whole run."""

import math

from esper.leyline.breaker import BreakerPhase
from esper.tamiyo.policy.columns import (
    FLAGS,
    GAIN,
    HEALTH,
    LOSS,
    SHARE,
    Sight,
    Table,
    Values,
    count,
    flags,
    gain,
    health,
    loss,
    share,
    size,
)

RUN = Table("run")
BUDGETS = ("live", "germinations", "parameters", "flops")
PHASES = (BreakerPhase.ALLOWED, BreakerPhase.TRIAL, BreakerPhase.COOLING, BreakerPhase.OPEN)

LEFT_OUT = {
    "step": "a count of steps means another time in every run; `remaining` and `tick` say it",
    "total_steps": "as `step`",
    "host": "the yardstick for sizes; its own size would tell runs apart, not what to do",
    "slots": "the features of slots",
    "version": "checked, see `check_observation`",
}


@RUN.add("remaining", ("share",))
def _remaining(s: Sight) -> Values:
    """Share of the run that is still to come: of its steps, or of its FLOP budget."""
    return (s.run.remaining,)


@RUN.add("ticks", ("done", "left", "left_known"), reads=("tick", "remaining"))
def _ticks(s: Sight) -> Values:
    """Ticks done, and those left at the present pace, which is unknown at the beginning."""
    tick, remaining = s.run.tick, max(0.0, s.run.remaining)
    known = tick > 0 and remaining < 1.0
    return count(tick), count(tick * remaining / (1.0 - remaining)) if known else 0.0, float(known)


@RUN.add("train_loss", LOSS)
def _train_loss(s: Sight) -> Values:
    """Training loss: how far it has fallen of where it began, its last fall in units of its own noise, that noise."""
    return loss(s.run.train_loss, s.memory.train)


@RUN.add("validation_loss", (*LOSS, "error", "error_known"))
def _validation_loss(s: Sight) -> Values:
    """Validation loss in the same units, and its standard error beside where it began."""
    reading, unit = s.run.validation_loss, s.unit
    error = (0.0, 0.0)
    if reading.se is not None and unit is not None:
        error = (1.0 + math.log10(max(reading.se / unit, 1e-6)) / 3.0, 1.0)
    return *loss(reading, s.memory.validation), *error


@RUN.add("gap", ("share", "known"), reads=("train_loss", "validation_loss"))
def _gap(s: Sight) -> Values:
    """Validation loss above training loss, as a share of where it began."""
    train, validation = s.run.train_loss.value, s.run.validation_loss.value
    if train is None or validation is None or s.unit is None:
        return 0.0, 0.0
    return math.asinh((validation - train) / s.unit), 1.0


@RUN.add("train_accuracy", SHARE)
def _train_accuracy(s: Sight) -> Values:
    """Training accuracy."""
    return share(s.run.train_accuracy)


@RUN.add("validation_accuracy", SHARE)
def _validation_accuracy(s: Sight) -> Values:
    """Validation accuracy."""
    return share(s.run.validation_accuracy)


@RUN.add("together", GAIN)
def _together(s: Sight) -> Values:
    """What all blended seeds save together."""
    return gain(s.run.together, s)


@RUN.add("host_gradient_norm", ("of_start", *FLAGS))
def _host_gradient_norm(s: Sight) -> Values:
    """Norm of the host's gradient beside its first, as a logarithm."""
    reading, first = s.run.host_gradient_norm, s.memory.host_norm.first
    ratio = 0.0 if not reading.value or not first else math.log10(reading.value / first)
    return ratio, *flags(reading)


@RUN.add("host_health", HEALTH)
def _host_health(s: Sight) -> Values:
    """Vanishing, exploding and broken gradients of the host."""
    return health(s.run.host_health)


@RUN.add("skipped_steps", ("count",))
def _skipped_steps(s: Sight) -> Values:
    """Steps skipped since the last tick."""
    return (count(s.run.skipped_steps),)


@RUN.add("budgets", tuple(f"{name}_{column}" for name in BUDGETS for column in ("left", "limited")), reads=("budgets",))
def _budgets(s: Sight) -> Values:
    """What may still be spent of each budget, beside the host's own size, and whether there is a limit. FLOPs of a host
    without an account count as unlimited."""
    left, host = s.run.budgets, s.run.host
    sizes = (
        None if left.live is None else count(left.live),
        None if left.germinations is None else count(left.germinations),
        None if left.parameters is None else size(left.parameters, host.parameters),
        None if left.flops is None or host.flops is None else size(left.flops, host.flops),
    )
    return tuple(number for one in sizes for number in ((0.0, 0.0) if one is None else (one, 1.0)))


@RUN.add("breaker", (*(phase.name.lower() for phase in PHASES), "ticks_left", "on_trial"))
def _breaker(s: Sight) -> Values:
    """Phase of the breaker of growth, how long it cools, whether a seed is on trial."""
    view = s.run.breaker
    phase = (float(view.phase is one) for one in PHASES)
    return *phase, count(view.ticks_left), float(view.on_trial is not None)


@RUN.add("grown", ("parameters", "slots"), reads=("slots", "host"))
def _grown(s: Sight) -> Values:
    """Parameters of all seeds beside the host's, and the number of slots."""
    return size(sum(view.parameters for view in s.run.slots), s.run.host.parameters), count(len(s.run.slots))


assert set(PHASES) == set(BreakerPhase), "a phase of the breaker without a column: add a feature, keep this one"
