"""Readings: absent is never zero; paired sums agree with the statistics module."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.evidence import ABSENT, Check, GateResult, Reading, Status, estimate_mean, measured
from esper.leyline.stages import Gate

SAMPLES = st.lists(st.floats(-10, 10), min_size=2, max_size=60)


@given(SAMPLES)
def test_paired_is_the_mean_and_its_standard_error(values):
    reading = estimate_mean(len(values), sum(values), sum(v * v for v in values), tick=3, min_samples=2)
    assert reading.value == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert reading.se == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-5)
    assert (reading.n, reading.tick, reading.status) == (len(values), 3, Status.MEASURED)


@given(SAMPLES, st.integers(0, 60))
def test_paired_does_not_depend_on_how_samples_were_sharded(values, cut):
    shards = [values[:cut], values[cut:]]
    n = sum(len(shard) for shard in shards)
    total, squares = sum(math.fsum(s) for s in shards), sum(math.fsum(v * v for v in s) for s in shards)
    parted = estimate_mean(n, total, squares, tick=0, min_samples=2)
    whole = estimate_mean(len(values), math.fsum(values), math.fsum(v * v for v in values), tick=0, min_samples=2)
    assert parted.value == pytest.approx(whole.value, abs=1e-9)
    assert parted.se == pytest.approx(whole.se, abs=1e-5)


@pytest.mark.parametrize(
    "sums", [(0, 0.0, 0.0), (1, 5.0, 25.0), (63, 1.0, 1.0), (64, math.nan, 1.0), (64, 1.0, math.inf)]
)
def test_too_few_or_broken_samples_are_absent_not_zero(sums):
    assert estimate_mean(*sums, tick=1, min_samples=64) is ABSENT


def test_two_samples_are_the_least_whatever_is_asked():
    assert estimate_mean(1, 1.0, 1.0, tick=1, min_samples=0) is ABSENT
    assert estimate_mean(2, 2.0, 2.0, tick=1, min_samples=0).se == 0.0


def test_rounding_never_makes_a_variance_negative():
    assert estimate_mean(100, 10.0, 1.0 - 1e-9, tick=0, min_samples=2).se == 0.0


@pytest.mark.parametrize(
    "fields",
    [
        {"status": Status.ABSENT, "value": 0.0, "tick": 1},
        {"status": Status.ABSENT, "tick": 1},
        {"status": Status.MEASURED},
        {"status": Status.STALE, "value": 1.0},
        {"status": Status.MEASURED, "value": math.nan, "tick": 1},
        {"status": Status.MEASURED, "value": math.inf, "tick": 1},
        {"status": Status.MEASURED, "value": 1.0, "tick": 1, "se": -0.1},
        {"status": Status.MEASURED, "value": 1.0, "tick": 1, "se": math.nan},
    ],
)
def test_an_inconsistent_reading_cannot_be_made(fields):
    with pytest.raises(ValueError, match=r"reading|standard error"):
        Reading(**fields)


def test_age_makes_stale_and_nothing_makes_fresh_again():
    reading = measured(0.5, tick=10, n=8, se=0.1)
    assert reading.as_of(11, 1) is reading
    old = reading.as_of(12, 1)
    assert (old.status, old.value, old.se, old.n, old.tick) == (Status.STALE, 0.5, 0.1, 8, 10)
    assert not old.is_measured
    assert old.as_of(10, 5) is old
    assert ABSENT.as_of(99, 0) is ABSENT
    assert not ABSENT.is_measured


def test_readings_print_for_people():
    assert str(ABSENT) == "absent"
    assert str(measured(0.123456, tick=1, n=2)) == "0.1235"
    assert str(measured(0.5, tick=7, n=2, se=0.25).as_of(9, 1)) == "0.5 ± 0.25 (stale, tick 7)"


def test_a_verdict_gives_its_failed_checks_as_the_reason():
    checks = (
        Check("finite", True, "yes", True),
        Check("k_se", False, "0.1 of 2.3", False),
        Check("n", False, "3", True),
    )
    result = GateResult(gate=Gate.G2, passed=False, score=1 / 3, checks=checks)
    assert result.reason == "k_se: 0.1 of 2.3; n: 3"
    assert GateResult(gate=Gate.G1, passed=True, score=1.0, checks=checks[:1]).reason == "passed"


@given(SAMPLES)
def test_skewness_is_that_of_the_sample_and_does_not_need_the_samples(values):
    sums = [math.fsum(v**power for v in values) for power in (1, 2, 3)]
    reading = estimate_mean(len(values), sums[0], sums[1], total_cube=sums[2], tick=3, min_samples=2)
    spread, middle = statistics.pstdev(values), statistics.fmean(values)
    assert abs(reading.skew) <= math.sqrt(len(values))
    if spread > 0.1:
        expected = statistics.fmean([(v - middle) ** 3 for v in values]) / spread**3
        assert reading.skew == pytest.approx(expected, abs=1e-6)


def test_skewness_is_none_where_it_was_not_measured_and_zero_where_nothing_varies():
    assert estimate_mean(4, 4.0, 4.0, tick=0, min_samples=2).skew is None
    assert estimate_mean(4, 4.0, 4.0, total_cube=4.0, tick=0, min_samples=2).skew == 0.0
    assert estimate_mean(4, 4.0, 4.0, total_cube=math.nan, tick=0, min_samples=2) is ABSENT
    with pytest.raises(ValueError, match="a skewness must be finite, got nan"):
        measured(1.0, tick=1, n=4, se=0.1, skew=math.nan)
