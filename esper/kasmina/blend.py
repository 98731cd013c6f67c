"""How a seed's delta joins the host's features.

    ADD    h + a * delta(x)        equals lerp(h, h + delta, a); the direct path to the host keeps factor 1

h: host features; delta: the seed's output, same shape; a: the agreed alpha in [0, 1], a 0-D float32 tensor.

At a = 0 the output *is* h, bit for bit (-0.0 and NaN payloads included), whatever the seed computes: by selection,
never by adding zero. The host's gradient is then that without the seed, bit for bit. It takes two measures: the blend
hands the upstream gradient to h alone (`HostOnly`), and the seed reads a detached x, since a zero gradient times an
infinite weight would still send NaN to the host.
"""

from typing import Any

import torch
from torch import Tensor


class HostOnly(torch.autograd.Function):
    """Forward: h. Backward: the gradient to h, zeros to delta (its owner sees a live but empty gradient)."""

    @staticmethod
    def forward(ctx: Any, host: Tensor, delta: Tensor) -> Tensor:
        """Returns ``host`` [any shape]; delta has the same shape."""
        ctx.save_for_backward(delta)
        return host.view_as(host)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Splits the upstream gradient."""
        (delta,) = ctx.saved_tensors
        return grads[0], torch.zeros_like(delta)


class StraightThrough(torch.autograd.Function):
    """Forward: h, exactly. Backward: the same gradient to h and to delta, as if h + delta had been returned.

    Bengio, Léonard, Courville 2013, "Estimating or Propagating Gradients Through Stochastic Neurons".
    """

    @staticmethod
    def forward(ctx: Any, host: Tensor, delta: Tensor) -> Tensor:
        """Returns ``host`` [any shape]; delta has the same shape."""
        return host.view_as(host)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The upstream gradient, twice."""
        return grads[0], grads[0]


def blend_add(host: Tensor, delta: Tensor, alpha: Tensor) -> Tensor:
    """ADD for alpha > 0: ``host + alpha * delta``.

    Args:
        host, delta: features [any shape], equal shapes; delta is cast to the host's dtype once (autocast).
        alpha: 0-D float32; being 0-D it does not widen a half-precision host.
    """
    return host + alpha * delta.to(host.dtype)
