"""The bound on running evidence: its steps against independent truths. tests/drill/test_luck.py counts passes."""

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from esper.accord.evidence.bound import bets, correct_skewness, log_evidence, normal_score, score
from esper.accord.evidence.sums import ClusterSums, Earlier, estimate
from tests.accord.evidence.test_sums import sums_of


@pytest.mark.parametrize("df", [29, 63, 191, 1023])
def test_a_normal_score_is_as_improbable_as_t(df):
    for t in (-6.0, -1.0, 0.0, 0.5, 2.0, 3.5, 6.0):
        assert normal_score(t, df) == pytest.approx(stats.norm.isf(stats.t.sf(t, df)), abs=3e-3)


def hall(values):
    """Hall (1992), equation by equation: t, the sample's skewness g, and the cubic transformation."""
    n, middle = len(values), statistics.fmean(values)
    g = statistics.fmean([(v - middle) ** 3 for v in values]) / statistics.pstdev(values) ** 3
    t = middle / (statistics.stdev(values) / math.sqrt(n))
    return t, t + g * t**2 / (3 * math.sqrt(n)) + g**2 * t**3 / (27 * n) + g / (6 * math.sqrt(n))


def test_what_is_scored_is_the_smaller_of_t_and_its_correction_for_skewness():
    rng = np.random.default_rng(3)
    for skew in (-3.0, -1.0, 0.01, 1.0, 3.0):
        shape = 4.0 / skew**2
        values = math.copysign(1.0, skew) * (rng.gamma(shape, size=192) - shape) / math.sqrt(shape) + 0.2
        t, corrected = hall(values.tolist())
        found = estimate(sums_of(values))
        assert correct_skewness(found.mean / found.se, found.skew, 192) == pytest.approx(min(t, corrected), rel=1e-9)
        assert score(sums_of(values), 0.0) == pytest.approx(normal_score(min(t, corrected), 191), rel=1e-9)
        assert abs(skew) < 0.5 or (corrected < t) == (skew < 0)


def test_without_spread_there_is_no_doubt():
    assert score(sums_of(np.full(64, 0.1)), 0.0) > 1e6  # but for rounding, infinite
    assert score(sums_of(np.full(64, 0.5)), 0.0) == math.inf
    assert score(sums_of(np.full(64, -0.5)), 0.0) == -math.inf
    assert score(sums_of(np.full(64, 0.5)), 0.5) == 0.0
    assert score(ClusterSums(), 0.0) is None
    assert log_evidence(sums_of(np.full(64, 0.5)), null=0.0, horizon=64, level=0.05) == math.inf


def test_a_bet_is_the_one_that_needs_least_once_its_horizon_is_seen():
    for horizon, level in ((384, 0.01), (1024, 1e-4)):
        (best,) = bets(horizon, level)
        needed = {
            bet: math.log(1 / level) / (bet * math.sqrt(horizon)) + bet * math.sqrt(horizon) / 2
            for bet in (best, 0.9 * best, 1.1 * best)
        }
        assert min(needed, key=needed.get) == best
        assert needed[best] == pytest.approx(math.sqrt(2 * math.log(1 / level)))
    assert len(bets(1839, 0.01)) == 1
    assert len(bets(1840, 0.01)) == 2
    assert bets(16 * 460, 0.01)[-1] == bets(460, 0.01)[0]


def test_the_log_of_e_is_that_of_the_mixture_written_out():
    d = np.random.default_rng(6).standard_normal(300) + 0.1
    sums, starts = sums_of(d), []
    for clusters in (40, 80, 160):
        starts.append(Earlier(clusters=clusters, count=clusters, total=float(d[:clusters].sum())))
    e = 1 / 16  # of the starts to come
    for weight, earlier in zip((1 / 2, 1 / 4, 1 / 8, 1 / 16), (Earlier(), *starts), strict=True):
        n = 300 - earlier.clusters
        (bet,) = bets(384 - earlier.clusters, 0.01)
        e += weight * math.exp(bet * score(sums, 0.002, earlier) * math.sqrt(n) - bet**2 * n / 2)
    assert log_evidence(sums, starts, null=0.002, horizon=384, level=0.01) == pytest.approx(math.log(e))


def test_below_thirty_clusters_it_is_absent():
    d = np.random.default_rng(7).standard_normal(240) + 9.0
    for clusters, absent in ((29, True), (30, False)):
        labels = np.arange(240) % clusters
        assert (log_evidence(sums_of(d, labels), null=0.0, horizon=40, level=0.01) is None) is absent


def test_a_seed_that_learns_late_is_seen_from_a_later_start():
    d = np.random.default_rng(8).standard_normal(1024)
    d[512:] += 0.25
    late = Earlier(clusters=512, count=512, total=float(d[:512].sum()))
    needed = math.log(1 / 0.01)
    assert log_evidence(sums_of(d), null=0.0, horizon=1024, level=0.01) < needed
    assert log_evidence(sums_of(d), [Earlier(clusters=9), late], null=0.0, horizon=1024, level=0.01) > needed
