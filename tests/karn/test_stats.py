"""Statistics over seeds against closed forms and against scipy (which comes with scikit-learn)."""

import numpy as np
import pytest
from scipy import stats as oracle

from esper.karn.stats import bootstrap, improvements, interquartile_means, mean, paired_difference


def test_the_interval_is_that_of_the_published_table():
    # Two-sided 95 % quantiles: 12.706 for 1 degree of freedom, 2.262 for 9 (Student 1908; any textbook's table).
    for n, quantile in ((2, 12.706), (10, 2.262)):
        found = mean([float(i % 2) for i in range(n)])
        assert found.high is not None
        assert (found.high - found.value) / found.se == pytest.approx(quantile, abs=5e-4)


def test_mean_has_the_interval_of_students_t():
    scores = np.random.default_rng(1).normal(3, 2, 7)
    found = mean(list(scores))
    low, high = oracle.t.interval(0.95, 6, scores.mean(), oracle.sem(scores))
    assert (found.value, found.se) == pytest.approx((scores.mean(), oracle.sem(scores)))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-4)
    assert mean([1.5]).low is None


def test_a_paired_difference_sees_what_seeds_share():
    random = np.random.default_rng(2)
    shared = random.normal(0, 10, 10)
    a, b = shared + 1 + random.normal(0, 0.1, 10), shared + random.normal(0, 0.1, 10)
    found = paired_difference(list(a), list(b))
    assert found.low is not None
    assert found.low > 0.8
    assert mean(list(a)).se > 20 * found.se
    with pytest.raises(ValueError, match="same seeds"):
        paired_difference([1.0], [1.0, 2.0])


def middle_of(scores) -> float:
    return float(interquartile_means(scores[None])[0])


def improvement_of(x, y) -> float:
    return float(improvements(x.reshape(1, len(x), -1), y.reshape(1, len(y), -1))[0])


@pytest.mark.parametrize("n", [4, 5, 8, 10, 11])
def test_interquartile_mean_equals_scipys_trimmed_mean_where_quarters_are_whole(n):
    scores = np.random.default_rng(n).exponential(size=n)
    if n % 4 == 0:
        assert middle_of(scores) == pytest.approx(oracle.trim_mean(scores, 0.25))
    repeated = np.repeat(scores, 4)  # four copies: every quarter is whole
    assert middle_of(scores) == pytest.approx(oracle.trim_mean(repeated, 0.25))


def test_improvement_is_mann_whitneys_u():
    random = np.random.default_rng(3)
    x, y = random.integers(0, 5, 9).astype(float), random.integers(0, 5, 7).astype(float)
    assert improvement_of(x, y) == pytest.approx(oracle.mannwhitneyu(x, y).statistic / 63)
    assert improvement_of(y, x) == pytest.approx(1 - improvement_of(x, y))


def rliable_probability_of_improvement(x, y) -> float:
    """As rliable.metrics defines it, task by task: Mann-Whitney's U over the number of pairs."""
    found = [oracle.mannwhitneyu(x[:, e], y[:, e], alternative="greater").statistic for e in range(x.shape[1])]
    return float(np.mean(found)) / (len(x) * len(y))


def test_statistics_and_intervals_are_those_of_rliable_for_unequal_numbers_of_runs():
    random = np.random.default_rng(5)
    x, y = random.integers(0, 6, (8, 2)).astype(float), random.integers(0, 5, (12, 2)).astype(float)
    assert improvement_of(x, y) == pytest.approx(rliable_probability_of_improvement(x, y))
    assert middle_of(x) == pytest.approx(oracle.trim_mean(x, 0.25, axis=None))
    # rliable's StratifiedIndependentBootstrap: every task of either group by itself, then percentiles.
    draws = [
        rliable_probability_of_improvement(
            *(np.stack([random.choice(g[:, e], len(g)) for e in range(2)], 1) for g in (x, y))
        )
        for _ in range(500)
    ]
    found = bootstrap(improvements, x, y)
    assert (found.low, found.high) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.04)
    assert found == bootstrap(improvements, x, y)


def test_one_run_has_no_bootstrap_interval():
    one, more = np.array([1.0]), np.array([0.0, 2.0, 3.0])
    assert (bootstrap(interquartile_means, one).low, bootstrap(interquartile_means, one).value) == (None, 1.0)
    assert bootstrap(improvements, more, one).high is None


def test_bootstrap_interval_agrees_with_scipys_and_is_a_function_of_its_seed():
    scores = np.random.default_rng(4).normal(size=30)
    found = bootstrap(lambda t: t.mean((1, 2)), scores, draws=4000)
    other = oracle.bootstrap((scores,), np.mean, method="percentile", n_resamples=4000, random_state=0)
    assert (found.low, found.high) == pytest.approx(tuple(other.confidence_interval), abs=0.04)
    assert found == bootstrap(lambda t: t.mean((1, 2)), scores, draws=4000)


def test_bootstrap_resamples_within_each_experiment():
    scores = np.stack([np.arange(6.0), 100 + np.arange(6.0)], 1)
    found = bootstrap(lambda t: t[:, :, 1].mean(1) - t[:, :, 0].mean(1), scores, draws=500)
    assert found.low is not None
    assert found.low > 95


def test_scores_that_say_nothing_are_refused():
    for bad in ([], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="finite"):
            mean(bad)
