"""Statistics for a handful of seeds: intervals, paired differences, interquartile means, probability of improvement.

    mean ± t-interval       Student's t over seeds; two arms on the same seeds are compared by their paired differences
    interquartile mean      mean of the middle half of the scores: robust like a median, tighter with few runs
    P(X > Y)                Mann-Whitney: share of pairs in which X is better, ties count half
    bootstrap               percentile intervals, resampling runs within each experiment (stratified)
    Holm                    p-values of several tests, so that the chance of any false rejection stays bounded; valid
                            under any dependence (Holm 1979, "A simple sequentially rejective multiple test procedure")

Agarwal, Schwarzer, Castro, Courville, Bellemare 2021, "Deep Reinforcement Learning at the Edge of the Statistical
Precipice". Shapes: N seeds, E experiments, scores [N] or [N, E].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binomtest
from scipy.stats import t as student

Array = npt.NDArray[np.float64]
DRAWS_AT_ONCE = 200  # some megabytes of pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """An estimate over seeds.

    Fields:
        value: the estimate.
        se: standard error over seeds; None from a bootstrap or from one seed.
        low: lower end of the 95 % interval; None from one seed, which says nothing about others.
        high: upper end of the 95 % interval; None likewise.
        n: number of seeds.
    """

    value: float
    se: float | None
    low: float | None
    high: float | None
    n: int


def mean(scores: Sequence[float]) -> Estimate:
    """Mean over seeds with its t-interval.

    Raises:
        ValueError: no score, or one that is not finite.
    """
    values = _finite(scores)
    n = len(values)
    centre = float(values.mean())
    if n == 1:
        return Estimate(value=centre, se=None, low=None, high=None, n=1)
    se = float(values.std(ddof=1)) / math.sqrt(n)
    half = float(student.ppf(0.975, n - 1)) * se
    return Estimate(value=centre, se=se, low=centre - half, high=centre + half, n=n)


def paired_difference(scores: Sequence[float], others: Sequence[float]) -> Estimate:
    """Mean of the differences, seed by seed.

    Raises:
        ValueError: the numbers of seeds differ, or a score is not finite.
    """
    a, b = _finite(scores), _finite(others)
    if len(a) != len(b):
        raise ValueError(f"paired differences of {len(a)} and {len(b)} seeds: the same seeds on both sides are needed")
    return mean(list(a - b))


def t_test(found: Estimate, bound: float) -> float:
    """Two-sided p-value of the mean being ``bound``, by Student's t over seeds.

    Args:
        found: from `mean` or `paired_difference`, with a standard error above 0.
        bound: the mean under the null, in the unit of the estimate.
    """
    assert found.se, "a spread of zero has no t"
    return float(2 * student.sf(abs(found.value - bound) / found.se, found.n - 1))


def sign_test(successes: int, n: int) -> float:
    """Exact two-sided p-value of ``successes`` of ``n`` seeds, if each is as likely a success as not."""
    return float(binomtest(successes, n, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values of several tests: rejecting those up to a level bounds the chance of any false rejection by it.

    The k-th smallest of m counts m - k + 1 times, and never less than a smaller one.
    """
    m = len(p_values)
    adjusted, highest = [0.0] * m, 0.0
    for place, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (m - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def interquartile_means(scores: Array) -> Array:
    """Mean of the scores between the quartiles (25 % trimmed) of each of D draws, [D], over scores [D, ...].

    A run that a quartile cuts counts by its share inside. rliable (``scipy.stats.trim_mean``) drops whole runs, a
    quarter rounded down at either end: the same if four divides the number of scores, and close to it otherwise.
    """
    ordered = np.sort(scores.reshape(len(scores), -1))
    n = ordered.shape[1]
    edges = np.clip(np.arange(n + 1), n / 4, 3 * n / 4)
    weights = np.diff(edges)
    return np.asarray((ordered * weights).sum(1) / weights.sum(), dtype=np.float64)


def bootstrap(statistic: Callable[..., Array], *groups: Array, draws: int = 2000, seed: int = 0) -> Estimate:
    """Statistic of groups of runs with its stratified percentile bootstrap interval.

    Args:
        statistic: of D draws, [D], from as many arrays [D, N, E] as there are groups.
        groups: scores [N] or [N, E] each; runs are resampled within every experiment by itself.
        draws: number of resamples.
        seed: of the resampling alone.

    Returns:
        The estimate; without an interval if a group is a single run, whose resample is always itself.
    """
    random = np.random.default_rng(seed)
    tables = [np.asarray(group, dtype=np.float64).reshape(len(group), -1) for group in groups]
    value = float(statistic(*(table[None] for table in tables))[0])
    if any(len(table) == 1 for table in tables):
        return Estimate(value=value, se=None, low=None, high=None, n=len(tables[0]))
    rows = [[random.integers(0, len(table), table.shape) for table in tables] for _ in range(draws)]
    values = []
    for some in range(0, draws, DRAWS_AT_ONCE):
        drawn = [np.stack([draw[i] for draw in rows[some : some + DRAWS_AT_ONCE]]) for i in range(len(tables))]
        values.append(statistic(*(np.take_along_axis(t[None], d, axis=1) for t, d in zip(tables, drawn, strict=True))))
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return Estimate(value=value, se=None, low=float(low), high=float(high), n=len(tables[0]))


def improvements(scores: Array, others: Array) -> Array:
    """P(X > Y) averaged over experiments, of each of D draws, [D]: share of pairs in which X is higher, ties half.

    Args:
        scores: [D, N, E]; higher is better.
        others: [D, M, E].
    """
    x, y = scores[:, :, None, :], others[:, None, :, :]
    above = (x > y) + 0.5 * (x == y)
    return np.asarray(above.reshape(len(above), -1).mean(1), dtype=np.float64)


def _finite(scores: Sequence[float]) -> Array:
    """The scores as an array, if there are any and all are finite."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"scores {list(scores)}: need at least one finite number per seed")
    return values
