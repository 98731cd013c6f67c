"""Sums over clusters: the mean and its error are those of the textbook, and of the whole however it was cut."""

import math
import statistics

import numpy as np
import pytest

from esper.accord.evidence.sums import NAMES, ClusterSums, Earlier, estimate, reading_of
from esper.kasmina.attribution.probe import difference_sums
from esper.leyline.evidence import ABSENT
from tests.support.agreed_states import sums_of_singles

torch = pytest.importorskip("torch")


def sums_of(differences: np.ndarray, labels: np.ndarray | None = None) -> ClusterSums:
    """Through the code that measures them."""
    clusters = None if labels is None else torch.from_numpy(np.unique(labels, return_inverse=True)[1])
    return ClusterSums.read(difference_sums([torch.from_numpy(differences)], clusters=clusters), "")


def test_of_single_samples_it_is_the_usual_mean_error_and_skewness():
    d = np.random.default_rng(1).gamma(2.0, size=90) - 1.0
    found = estimate(sums_of(d))
    middle, spread = d.mean(), d.std()
    assert found.mean == pytest.approx(middle)
    assert found.se == pytest.approx(statistics.stdev(d) / math.sqrt(90))
    assert found.skew == pytest.approx(((d - middle) ** 3).mean() / spread**3)
    assert found.clusters == 90
    assert sums_of(d).named() == pytest.approx(sums_of_singles(90, *((d**power).sum() for power in (1, 2, 3))))


def test_of_clusters_it_is_the_error_of_a_ratio():
    rng = np.random.default_rng(2)
    labels = np.repeat(np.arange(40), rng.integers(1, 9, 40))
    d = rng.standard_normal(40)[labels] + rng.standard_normal(len(labels)) + 0.3
    found = estimate(sums_of(d, rng.permutation(1000)[:40][labels]))
    e = np.array([(d[labels == i] - d.mean()).sum() for i in range(40)])  # residuals, cluster by cluster
    assert found.mean == pytest.approx(d.mean())
    assert found.se == pytest.approx(math.sqrt(40 / 39 * (e**2).sum()) / len(d))
    assert found.skew == pytest.approx((e**3).mean() / (e**2).mean() ** 1.5)
    assert found.se > 1.3 * statistics.stdev(d) / math.sqrt(len(d)), "more than if samples were independent"


def test_t_of_clustered_samples_has_the_deviation_of_students_law():
    rng, scores = np.random.default_rng(3), []
    labels = np.repeat(np.arange(64), 8)
    for _ in range(400):
        found = estimate(sums_of(0.6 * rng.standard_normal(64)[labels] + 0.8 * rng.standard_normal(512), labels))
        scores.append(found.mean / found.se)
    assert 0.93 < np.std(scores) < 1.1, "counted as independent it is 1.9"


def test_parts_add_up_and_a_sign_turns_round():
    d = np.random.default_rng(4).standard_normal(100) + 0.2
    parts = sums_of(d[:33]) + sums_of(d[33:])
    assert parts.named() == pytest.approx(sums_of(d).named())
    assert (-parts).named() == pytest.approx(sums_of(-d).named())
    assert ClusterSums.of([getattr(parts, name) for name in NAMES]) == parts


def test_from_a_later_start_the_mean_is_anew_and_the_spread_that_of_all():
    d = np.concatenate([[-50.0], np.full(99, 1.0)])
    earlier = Earlier(clusters=50, count=50, total=float(d[:50].sum()))
    found = estimate(sums_of(d), earlier)
    assert (found.mean, found.clusters) == (1.0, 50)
    assert found.se == pytest.approx(math.sqrt(((d - 1.0) ** 2).sum() / 99 * 50) / 50), "harm seen once stays"
    assert found.skew < -9.0


@pytest.mark.parametrize("sums", [ClusterSums(), ClusterSums(clusters=1, count=9), ClusterSums(clusters=9, count=0)])
def test_too_little_is_no_estimate(sums):
    assert estimate(sums) is None
    assert reading_of(sums, tick=1, min_samples=1) is ABSENT


def test_a_reading_is_absent_below_its_samples_and_where_a_sum_is_not_finite():
    sums = sums_of(np.random.default_rng(5).standard_normal(64))
    assert reading_of(sums, tick=3, min_samples=64).is_measured
    assert reading_of(sums, tick=3, min_samples=65) is ABSENT
    assert reading_of(sums + ClusterSums(total_cube=math.inf), tick=3, min_samples=2) is ABSENT
