"""Has a metric stopped falling? Judged by the metric's own noise, not by a fixed number of points.

Over the last 2w values x, with d_i = x_{i+1} - x_i (m = 2w - 1 of them):

    improvement = mean(older w) - mean(newer w)
    noise^2     = sum (d_i - mean d)^2 / (2 (m - 1/m))      unbiased for white noise about a straight trend
    SE          = noise * sqrt(2 / w)

Differences cancel the trend (von Neumann's idea), so a steep fall does not pass for noise. The standard error of a
single validation would be the wrong scale: the same samples are read at each tick, so it cancels in the comparison.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Trend(NamedTuple):
    """How far the mean fell between two windows, and the standard error of that; unit of the metric."""

    improvement: float
    se: float


def trend(values: Sequence[float], window: int) -> Trend | None:
    """Compares the last ``window`` values with the ``window`` before them; None with fewer than both.

    Args:
        values: one metric, oldest first; lower is better.
        window: values per window, at least 2.
    """
    if len(values) < 2 * window:
        return None
    recent = list(values[-2 * window :])
    steps = [after - before for before, after in pairwise(recent)]
    m, drift = len(steps), sum(steps) / len(steps)
    variance = sum((step - drift) ** 2 for step in steps) / (2 * (m - 1 / m))
    improvement = (sum(recent[:window]) - sum(recent[window:])) / window
    return Trend(improvement, (variance * 2 / window) ** 0.5)
