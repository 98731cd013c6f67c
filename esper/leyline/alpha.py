"""Alpha ramps: committed at a tick, then a pure function of the optimizer step on every rank.

With u = (step - first) / (last - first) clamped to [0, 1]:

    LINEAR      c(u) = u
    COSINE      c(u) = (1 - cos(pi u)) / 2
    SIGMOID(k)  c(u) = (s(k(2u - 1)) - s(-k)) / (s(k) - s(-k)),  s the logistic function

alpha(step) = start + (target - start) * c(u), snapped to exactly ``start`` up to ``first`` and to exactly ``target``
from ``last`` on. A ramp of zero steps is at its target at once.

A ramp that switches the operator fades from the old one to the new one; c(u) is the share of the new one.
"""

import math
from dataclasses import dataclass
from enum import IntEnum


class Operator(IntEnum):
    """The way a seed's delta joins the host's features (see `esper.kasmina.slots.blend`). The number is the wire
    code."""

    ADD = 0
    MULTIPLY = 1
    GATE = 2
    CONFIDENCE = 3
    CHANNEL = 4

    @property
    def is_gated(self) -> bool:
        """True if the delta is scaled by a number per sample. At full alpha that number is 1 and the operator *is* ADD,
        bit for bit."""
        return _OPERATORS[self].gated

    @property
    def is_additive(self) -> bool:
        """True if at rest it adds a multiple of the delta, channel by channel, so that an affine delta stays affine."""
        return _OPERATORS[self].additive

    @property
    def needs(self) -> str:
        """What a slot must have before it may use this operator, as text; empty if it needs nothing."""
        return _OPERATORS[self].needs


@dataclass(frozen=True, slots=True)
class _OperatorTraits:
    gated: bool = False
    additive: bool = True
    needs: str = ""


_OPERATORS = {
    Operator.ADD: _OperatorTraits(),
    Operator.MULTIPLY: _OperatorTraits(additive=False),
    Operator.GATE: _OperatorTraits(gated=True),
    Operator.CONFIDENCE: _OperatorTraits(gated=True, needs="a model whose output is class logits [B, K >= 2]"),
    Operator.CHANNEL: _OperatorTraits(needs="a vector v of the slot's width: set slots.channels"),
}
if set(_OPERATORS) != set(Operator):
    raise AssertionError(f"operators without a row: {set(Operator) ^ set(_OPERATORS)}")


class Curve(IntEnum):
    """Shape of a ramp. The number is the wire code."""

    LINEAR = 0
    COSINE = 1
    SIGMOID = 2


class AlphaMode(IntEnum):
    """HOLD: alpha is at rest. UP, DOWN: alpha is on its way to the target."""

    HOLD = 0
    UP = 1
    DOWN = 2


STEEPNESS = (0.01, 50.0)
"""Smallest and largest k of SIGMOID: from all but a line to all but a step. Below, c(u) is lost to rounding."""


def steepness_fits(k: float) -> bool:
    """Whether ``k`` is a steepness that a ramp can have."""
    return STEEPNESS[0] <= k <= STEEPNESS[1]


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


def _progress(curve: Curve, u: float, steepness: float) -> float:
    if curve is Curve.LINEAR:
        return u
    if curve is Curve.COSINE:
        return 0.5 * (1.0 - math.cos(math.pi * u))
    low, high = _logistic(-steepness), _logistic(steepness)
    return (_logistic(steepness * (2.0 * u - 1.0)) - low) / (high - low)


def check_alpha(value: float, what: str = "alpha") -> float:
    """Returns ``value`` as a float.

    Raises:
        ValueError: NaN, infinite, or outside [0, 1].
    """
    if not (isinstance(value, int | float) and math.isfinite(value) and 0.0 <= value <= 1.0):
        raise ValueError(f"{what} = {value!r}: must be a finite number in [0, 1]")
    return float(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ramp:
    """A committed path of alpha.

    Fields:
        start: alpha before the ramp, in [0, 1].
        target: alpha after the ramp, in [0, 1].
        first_step: optimizer step up to which alpha is ``start``.
        last_step: optimizer step from which alpha is ``target``.
        curve: shape of the ramp.
        steepness: k of SIGMOID, in `STEEPNESS`; other curves ignore it.
        operator: how the delta is joined while this ramp is in force.
        fades_from: the operator that this ramp switches from; None if it does not switch.
    """

    start: float
    target: float
    first_step: int
    last_step: int
    curve: Curve
    steepness: float
    operator: Operator
    fades_from: Operator | None = None

    def __post_init__(self) -> None:
        check_alpha(self.start, "ramp.start")
        check_alpha(self.target, "ramp.target")
        if not 0 <= self.first_step <= self.last_step:
            raise ValueError(f"ramp steps {self.first_step}..{self.last_step}: need 0 <= first <= last")
        if not steepness_fits(self.steepness):
            raise ValueError(f"ramp.steepness = {self.steepness!r}: must be {STEEPNESS[0]:g} to {STEEPNESS[1]:g}")
        if self.fades_from is self.operator:
            raise ValueError(f"ramp.fades_from = {self.operator.name}: that is its operator; need another one, or None")

    def progress(self, step: int) -> float:
        """Share of the ramp that is done at ``step``, 0 to 1, along the curve."""
        if step >= self.last_step:
            return 1.0
        if step <= self.first_step:
            return 0.0
        u = (step - self.first_step) / (self.last_step - self.first_step)
        return min(1.0, max(0.0, _progress(self.curve, u, self.steepness)))

    def value(self, step: int) -> float:
        """Alpha at an optimizer step, in [0, 1], monotone between start and target."""
        if step >= self.last_step:
            return self.target
        return min(1.0, max(0.0, self.start + (self.target - self.start) * self.progress(step)))

    def mode(self, step: int) -> AlphaMode:
        """HOLD once the ramp is done, before that its direction."""
        if step >= self.last_step:
            return AlphaMode.HOLD
        return AlphaMode.UP if self.target >= self.start else AlphaMode.DOWN

    def fade(self, step: int) -> float:
        """Share of ``operator`` at ``step``; the rest belongs to ``fades_from``. 1 if the ramp does not switch."""
        return 1.0 if self.fades_from is None else self.progress(step)

    def operators(self, step: int) -> tuple[Operator, Operator | None]:
        """The operator in force at ``step``, and the one that is being faded out, or None.

        A gated operator at rest at full alpha is ADD, which needs no gate.
        """
        if step < self.last_step:
            return self.operator, self.fades_from
        return (Operator.ADD if self.operator.is_gated and self.target == 1.0 else self.operator), None
