"""The trend of a metric, which tells whether it has stopped falling, judged by its own noise instead of a fixed margin.

Over the last 2w values x, with d_i = x_{i+1} - x_i (m = 2w - 1 of them):

    improvement = mean(older w) - mean(newer w)
    noise^2     = sum (d_i - mean d)^2 / (2 (m - 1/m))      unbiased for white noise about a straight trend
    SE          = noise * sqrt(2 / w)

Differences cancel the trend (von Neumann's idea), so a steep fall is not mistaken for noise. The standard error of a
single validation would be the wrong scale: every tick uses the same samples, so it cancels in the comparison.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Trend(NamedTuple):
    """The fall of the mean between two windows, and its standard error, in the unit of the metric."""

    improvement: float
    se: float


def measure_trend(values: Sequence[float], window: int) -> Trend | None:
    """Compares the last ``window`` values with the ``window`` before them; None with fewer than two windows.

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
