"""The blend of a seed's delta with the host's features: h + increment, one pure function per operator.

    ADD         a * delta(x)                    equals lerp(h, h + delta, a); the direct path to the host keeps factor 1
    MULTIPLY    h * a * c * tanh(delta(x))      c = 0.9: h is scaled within [1 - ca, 1 + ca]; it never reaches 0
    GATE        a * g_eff * delta(x)            g_eff = g + (1 - g) * a, g in (0, 1) per sample from the slot's gate
    CONFIDENCE  the same                        g = top-1 minus top-2 probability of class logits
    CHANNEL     a * v * delta(x)                v in [0, 1] per channel

h: host features; delta: the seed's output, same shape; a: the agreed alpha in [0, 1], a 0-D float32 tensor.

At a = 0 the output *is* h, bit for bit (-0.0 and NaN payloads included), whatever the seed computes: it is selected,
never made by adding zero. The host's gradient is then the one without the seed, bit for bit. Two measures see to that:
the blend passes the upstream gradient to h alone (`HostOnly`), and the seed reads a detached x, since a zero gradient
times an infinite weight would still send NaN to the host.

What is returned has memory of its own, at a = 0 too: the module behind a slot may work in place (``y += x``, a ReLU
with inplace=True), which must not reach what the seed has kept for backward, and torch refuses on a view made by a
Function. The copy is made where a seed learns at a = 0 (straight-through, the first step of a ramp) and nowhere else:
a slot that is empty or does not learn hands the host's own tensor on, and for a > 0 the sum is new anyway.

Eager code reads "a is 0" off the ramp, as a Python number. Compiled code reads it off the tensor, so that one graph
serves a whole ramp: `select` takes the place of `HostOnly`, and a `door` stands where the host's features and the
seed's input enter. Where they are closed the gradient is -0.0, which changes no bit of a gradient that it is added to
(0.0 would turn -0.0 into 0.0).

At a = 1 g_eff is exactly 1, so that GATE and CONFIDENCE equal ADD, bit for bit, and the gate can go without a jump.
g_eff follows alpha itself and not the progress of a ramp: alpha is continuous over partial targets and new ramps.

A ramp that switches the operator is a cross-fade of increments, h + (1 - w) * old + w * new with w from 0 to 1: the
output does not jump, and at a = 0, where both are 0, there is nothing to fade.

A seed that is a whole block of the host (`esper.kasmina.axes.block`) is joined by h + a (block(h) - h) alone. At a = 1
that is block(h) itself, by selection in forward and backward, so that the network then is the deeper one; the direct
path to the host has the factor 1 - a, and beside it the skip that the block has.

`esper.kasmina.export.join` writes the same formulas in calls that torch.fx can record, with alpha as a constant.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper.leyline.alpha import Operator

MULTIPLY_BOUND = 0.9  # c; tanh is exactly -1 in float32 from -10 on, and 1 - c must stay above 0


class HostOnly(torch.autograd.Function):
    """Forward: h. Backward: the gradient to h, zeros to the others (their owners get a gradient, but an empty one)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(host: Tensor, *others: Tensor) -> Tensor:
        """Returns a copy of ``host`` [any shape], which may be written into; ``others``: the delta and the gate's g."""
        return host.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps the others for their shapes."""
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Returns the upstream gradient for h, and zeros for each of the others."""
        return grads[0], *(torch.zeros_like(other) for other in ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor | None:
        """Returns the tangent of h."""
        return None if tangents[0] is None else tangents[0].clone()


class StraightThrough(torch.autograd.Function):
    """Forward: h, exactly. Backward: the same gradient to h and to the increment, as if their sum had been returned.

    Bengio, Léonard, Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(host: Tensor, increment: Tensor) -> Tensor:
        """Returns a copy of ``host`` [any shape]; ``increment`` has the same shape."""
        return host.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keeps nothing."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the upstream gradient twice."""
        return grads[0], grads[0]


class EagerStraightThrough(StraightThrough):
    """`StraightThrough` with a forward mode, which dynamo refuses to trace."""

    @staticmethod
    def jvp(ctx: Any, host: Tensor | None, increment: Tensor | None) -> Tensor | None:
        """Returns the sum of the tangents."""
        if host is None or increment is None:
            return host if increment is None else increment.clone()
        return host + increment


def straight_through(host: Tensor, increment: Tensor) -> Tensor:
    """`StraightThrough` of two tensors of one shape."""
    function = StraightThrough if torch.compiler.is_compiling() else EagerStraightThrough
    return function.apply(host, increment)


class Strength(NamedTuple):
    """The factors by which the delta is joined; each broadcasts over the features, and is None where it is not used.

    Fields:
        alpha: a, 0-D float32.
        gate: g of GATE, [B, 1, ...] or [B, T, 1].
        confidence: g of CONFIDENCE, [B, 1, ...].
        channels: v of CHANNEL, float32 [C] or [C, 1, 1].
    """

    alpha: Tensor
    gate: Tensor | None = None
    confidence: Tensor | None = None
    channels: Tensor | None = None


Increment = Callable[[Tensor, Tensor, Strength], Tensor]  # (host, delta, strength) -> what is added to host


def effective(g: Tensor, alpha: Tensor) -> Tensor:
    """Computes g_eff = g + (1 - g) * alpha, in a form that is exactly 1 at alpha = 1."""
    return 1.0 - (1.0 - g) * (1.0 - alpha)


def _apply_coefficient(coefficient: Tensor, delta: Tensor) -> Tensor:
    """Multiplies; a 0-D float32 coefficient does not widen a half-precision delta, any other is cast to its dtype."""
    return (coefficient if coefficient.ndim == 0 else coefficient.to(delta.dtype)) * delta


def _add(host: Tensor, delta: Tensor, strength: Strength) -> Tensor:
    return _apply_coefficient(strength.alpha, delta)


def _multiply(host: Tensor, delta: Tensor, strength: Strength) -> Tensor:
    return host * _apply_coefficient(MULTIPLY_BOUND * strength.alpha, torch.tanh(delta))


def _gate(host: Tensor, delta: Tensor, strength: Strength) -> Tensor:
    assert strength.gate is not None
    return _apply_coefficient(strength.alpha * effective(strength.gate, strength.alpha), delta)


def _confidence(host: Tensor, delta: Tensor, strength: Strength) -> Tensor:
    assert strength.confidence is not None
    return _apply_coefficient(strength.alpha * effective(strength.confidence, strength.alpha), delta)


def _channel(host: Tensor, delta: Tensor, strength: Strength) -> Tensor:
    assert strength.channels is not None
    return _apply_coefficient(strength.alpha * strength.channels, delta)


INCREMENTS: dict[Operator, Increment] = {
    Operator.ADD: _add,
    Operator.MULTIPLY: _multiply,
    Operator.GATE: _gate,
    Operator.CONFIDENCE: _confidence,
    Operator.CHANNEL: _channel,
}
if set(INCREMENTS) != set(Operator):
    raise AssertionError(f"operators without a formula: {set(Operator) ^ set(INCREMENTS)}")


def blend(
    host: Tensor,
    delta: Tensor,
    strength: Strength,
    operator: Operator,
    fades_from: Operator | None = None,
    fade: Tensor | None = None,
) -> Tensor:
    """Returns the output of a slot for alpha > 0; changes neither tensor.

    Args:
        host: features h [any shape].
        delta: the seed's output, same shape; cast to the host's dtype once (autocast).
        strength: alpha, and the factors that the operators use.
        operator: the operator in force.
        fades_from: the operator being faded out; None without a cross-fade.
        fade: w, 0-D float32, the share of ``operator`` in a cross-fade.
    """
    delta = delta.to(host.dtype)
    new = INCREMENTS[operator](host, delta, strength)
    if fades_from is None:
        return host + new
    assert fade is not None
    old = INCREMENTS[fades_from](host, delta, strength)
    return host + (1.0 - fade) * old + fade * new


def replace(host: Tensor, block: Tensor, alpha: Tensor, *, full: bool) -> Tensor:
    """Returns h + a (block(h) - h) for a > 0, and block(h) itself at exactly 1; changes neither tensor.

    Args:
        host: features h [any shape].
        block: block(h), same shape.
        alpha: a, 0-D float32.
        full: whether a is exactly 1.
    """
    block = block.to(host.dtype)
    return block if full else host + _apply_coefficient(alpha, block - host)


def replace_by_tensor(host: Tensor, block: Tensor, alpha: Tensor) -> Tensor:
    """`replace`, with "a is 1" read off the tensor: 0-D, or [B, 1, ...] with one alpha per sample."""
    full, block = alpha == 1, block.to(host.dtype)
    inner, other = door(host, full), door(block, full)
    return select(full, block, inner + _apply_coefficient(alpha, other - inner))


def door(t: Tensor, closed: Tensor) -> Tensor:
    """Returns ``t``, bit for bit. An open door passes the gradient; a closed one makes it -0.0, even where it is NaN.

    Args:
        t: any tensor.
        closed: 0-D bool.
    """
    return -torch.where(closed, -t.detach(), -t)


def select(closed: Tensor, host: Tensor, blended: Tensor) -> Tensor:
    """Returns ``host`` if closed, else ``blended``, bit for bit; the other one gets the gradient -0.0.

    Args:
        closed: 0-D bool, or one per sample.
        host: features.
        blended: features of the same shape.
    """
    return -torch.where(closed, -host, -blended)
