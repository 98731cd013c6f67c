"""The plateau test against closed forms and its own error rates."""

import math
import random

import pytest

from esper.tamiyo.plateau import measure_trend


def test_too_few_values_have_no_trend():
    assert measure_trend([3.0, 2.0, 1.0], 2) is None
    assert measure_trend([4.0, 3.0, 2.0, 1.0], 2) is not None


def test_a_straight_fall_is_all_improvement_and_no_noise():
    seen = measure_trend([10.0 - 0.5 * i for i in range(8)], 4)
    assert seen.improvement == pytest.approx(2.0)
    assert seen.se == pytest.approx(0.0, abs=1e-12)


def test_only_the_last_two_windows_count():
    assert measure_trend([1e6, -1e6, 4.0, 3.0, 2.0, 1.0], 2) == measure_trend([4.0, 3.0, 2.0, 1.0], 2)


@pytest.mark.parametrize("slope", [0.0, -0.3])
@pytest.mark.parametrize("window", [2, 4, 8])
def test_the_noise_estimate_is_unbiased_about_a_trend(slope, window):
    rng, sigma, n = random.Random(1), 0.2, 4000
    series = [[slope * i + rng.gauss(0, sigma) for i in range(2 * window)] for _ in range(n)]
    variances = [measure_trend(values, window).se ** 2 for values in series]
    assert sum(variances) / n == pytest.approx(sigma**2 * 2 / window, rel=0.1)


def test_the_standard_error_is_that_of_the_improvement():
    rng, window, n = random.Random(2), 4, 4000
    improvements = [measure_trend([rng.gauss(1, 0.5) for _ in range(2 * window)], window).improvement for _ in range(n)]
    spread = math.sqrt(sum(value**2 for value in improvements) / n)
    assert spread == pytest.approx(0.5 * math.sqrt(2 / window), rel=0.05)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_verdict_does_not_depend_on_the_unit(scale):
    values = [2.0, 1.7, 1.9, 1.4, 1.2, 1.3, 0.9, 1.0]
    plain, scaled = measure_trend(values, 4), measure_trend([value * scale for value in values], 4)
    assert scaled.improvement / scaled.se == pytest.approx(plain.improvement / plain.se)
