"""How a seed's delta joins the host's features: h + increment, one pure function per operator.

    ADD         a * delta(x)                    equals lerp(h, h + delta, a); the direct path to the host keeps factor 1
    MULTIPLY    h * a * c * tanh(delta(x))      c = 0.9: h is scaled within [1 - ca, 1 + ca]; it never reaches 0
    GATE        a * g_eff * delta(x)            g_eff = g + (1 - g) * a, g in (0, 1) per sample from the slot's gate
    CONFIDENCE  the same                        g = top-1 minus top-2 probability of class logits
    CHANNEL     a * v * delta(x)                v in [0, 1] per channel

h: host features; delta: the seed's output, same shape; a: the agreed alpha in [0, 1], a 0-D float32 tensor.

At a = 0 the output *is* h, bit for bit (-0.0 and NaN payloads included), whatever the seed computes: by selection,
never by adding zero. The host's gradient is then that without the seed, bit for bit. It takes two measures: the blend
hands the upstream gradient to h alone (`HostOnly`), and the seed reads a detached x, since a zero gradient times an
infinite weight would still send NaN to the host.

Eager code takes "a is 0" from the ramp, on the host. What is compiled takes it from the tensor, so that one graph
serves a whole ramp: `select` in the place of `HostOnly`, and a `door` where host and seed's input go in. Where they are
shut their gradient is -0.0, which added to another changes no bit of it (0.0 would turn -0.0 into 0.0).

At a = 1 g_eff is exactly 1, so that GATE and CONFIDENCE are ADD, bit for bit, and the gate can leave without a jump. It
closes with alpha itself and not with the progress of a ramp: alpha is continuous over partial targets and new ramps.

A ramp that switches the operator is a cross-fade of increments, h + (1 - w) * old + w * new with w from 0 to 1: the
output does not jump, and at a = 0, where both are 0, there is nothing to fade.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper.leyline.alpha import Operator

MULTIPLY_BOUND = 0.9  # c; tanh is exactly -1 in float32 from -10 on, and 1 - c must stay above 0


class HostOnly(torch.autograd.Function):
    """Forward: h. Backward: the gradient to h, zeros to the others (their owner sees a live but empty gradient)."""

    @staticmethod
    def forward(ctx: Any, host: Tensor, *others: Tensor) -> Tensor:
        """Returns ``host`` [any shape]; others: the seed's delta, the gate's g."""
        ctx.save_for_backward(*others)
        return host.view_as(host)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        """Splits the upstream gradient."""
        return grads[0], *(torch.zeros_like(other) for other in ctx.saved_tensors)


class StraightThrough(torch.autograd.Function):
    """Forward: h, exactly. Backward: the same gradient to h and to the increment, as if their sum had been returned.

    Bengio, Léonard, Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
    """

    @staticmethod
    def forward(ctx: Any, host: Tensor, increment: Tensor) -> Tensor:
        """Returns ``host`` [any shape]; increment has the same shape."""
        return host.view_as(host)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The upstream gradient, twice."""
        return grads[0], grads[0]


class Strength(NamedTuple):
    """How strongly the delta is joined; everything broadcasts over the features.

    Fields:
        alpha: 0-D float32. gate: g of GATE, [B, 1, ...] or [B, T, 1]. confidence: g of CONFIDENCE, [B, 1, ...].
        channels: v of CHANNEL, float32 [C] or [C, 1, 1]. Each is None where no operator asks for it.
    """

    alpha: Tensor
    gate: Tensor | None = None
    confidence: Tensor | None = None
    channels: Tensor | None = None


Increment = Callable[[Tensor, Tensor, Strength], Tensor]  # (host, delta, strength) -> what is added to host


def effective(g: Tensor, alpha: Tensor) -> Tensor:
    """g + (1 - g) * alpha, in a form that is exactly 1 at alpha = 1."""
    return 1.0 - (1.0 - g) * (1.0 - alpha)


def _scaled(coefficient: Tensor, delta: Tensor) -> Tensor:
    """Being 0-D a float32 does not widen a half-precision delta; any other is cast."""
    return (coefficient if coefficient.ndim == 0 else coefficient.to(delta.dtype)) * delta


def _add(host: Tensor, delta: Tensor, strength: Strength) -> Tensor:
    return _scaled(strength.alpha, delta)


def _multiply(host: Tensor, delta: Tensor, strength: Strength) -> Tensor:
    return host * _scaled(MULTIPLY_BOUND * strength.alpha, torch.tanh(delta))


def _gate(host: Tensor, delta: Tensor, strength: Strength) -> Tensor:
    assert strength.gate is not None
    return _scaled(strength.alpha * effective(strength.gate, strength.alpha), delta)


def _confidence(host: Tensor, delta: Tensor, strength: Strength) -> Tensor:
    assert strength.confidence is not None
    return _scaled(strength.alpha * effective(strength.confidence, strength.alpha), delta)


def _channel(host: Tensor, delta: Tensor, strength: Strength) -> Tensor:
    assert strength.channels is not None
    return _scaled(strength.alpha * strength.channels, delta)


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
    """The output of a slot for alpha > 0; changes neither tensor.

    Args:
        host, delta: features [any shape], equal shapes; delta is cast to the host's dtype once (autocast).
        strength: alpha, and what the operators ask for.
        operator: in force. fades_from: being faded out, None: none. fade: w, 0-D float32, the new one's share.
    """
    delta = delta.to(host.dtype)
    new = INCREMENTS[operator](host, delta, strength)
    if fades_from is None:
        return host + new
    assert fade is not None
    old = INCREMENTS[fades_from](host, delta, strength)
    return host + (1.0 - fade) * old + fade * new


def door(t: Tensor, closed: Tensor) -> Tensor:
    """``t``, bit for bit. Its gradient passes where open; where closed it is -0.0, whatever came (NaN too).

    Args:
        t: [any shape]. closed: 0-D bool.
    """
    return -torch.where(closed, -t.detach(), -t)


def select(closed: Tensor, host: Tensor, blended: Tensor) -> Tensor:
    """``host`` where closed, else ``blended``, bit for bit; the gradient goes to the one chosen, -0.0 to the other.

    Args:
        closed: 0-D bool. host, blended: features, equal shapes.
    """
    return -torch.where(closed, -host, -blended)
