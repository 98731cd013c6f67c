"""How far apart two computations of the same thing may be when numbers are rounded, by propagation of errors."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from esper.leyline.evidence import Reading


def skew_rounding(reading: Reading, eps: float) -> float:
    """How far apart the skewness of the same paired differences may be when their losses are rounded, at the most.

    With n differences d of deviation s and z = (d - mean) / s, the skewness is g = mean z^3, and

        dg / dd_i = 3 (z_i^2 - 1 - g z_i) / (n s)

    so an error of at most e in each d moves g by at most 3 e / s * mean |z^2 - 1 - g z| <= 3 e / s * (2 + |g|), as the
    means of z^2 and of |z| are at most 1. A d is one loss minus another, and both sides have one: four losses, below 4
    nats, which are rounded by half a unit in the last place, eps nats each. So e = 4 eps. Seeds that do next to nothing
    have an s of some 1e-4 nats, where this is 0.03 in float32, and 6e-11 in float64.

    Args:
        reading: whose ``se`` is s / sqrt(n - 1), every sample being a cluster.
        eps: of the precision.
    """
    assert reading.se is not None
    assert reading.skew is not None
    deviation = reading.se * math.sqrt(max(reading.n - 1, 1))
    return 3 * 4 * eps / deviation * (2 + abs(reading.skew)) if deviation else math.inf


def adam_rounding(moments: Mapping[str, Any], off: float, lr: float, steps: int) -> Tensor | float:
    """How far apart weights may be after some steps of Adam from one start, if gradients are, at the most.

    A step is u = lr m / sqrt(v), corrected for its number, and |m| <= sqrt(v) but for a factor near 1, so an error of e
    in gradients moves u by at most

        lr (e / sqrt(v) + |m| / v * e) <= 2 lr e / sqrt(v)

    which is large where a gradient is close to nothing: Adam takes steps of one size along all of them, rounding too.

    Args:
        moments: of a parameter, after the steps.
        off: e, as a share of the largest of its gradients.
        lr: learning rate.
        steps: since both were the same.
    """
    if "exp_avg_sq" not in moments or not lr:
        return 0.0
    root = (moments["exp_avg_sq"] / (1 - 0.999 ** float(moments["step"]))).sqrt()
    return steps * lr * (2 * off * float(root.nan_to_num().max()) / (root + 1e-30)).clamp(max=2.0)
