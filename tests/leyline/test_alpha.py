"""Ramps: closed forms, monotone, clamped, exact at both ends."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.leyline.alpha import STEEPNESS, AlphaMode, Curve, Operator, Ramp, check_alpha

UNIT = st.floats(0.0, 1.0)


def ramp(start=0.0, target=1.0, first=10, last=20, curve=Curve.LINEAR, steepness=6.0):
    return Ramp(
        start=start,
        target=target,
        first_step=first,
        last_step=last,
        curve=curve,
        steepness=steepness,
        operator=Operator.ADD,
    )


RAMPS = st.builds(
    lambda start, target, first, length, curve, steepness: ramp(start, target, first, first + length, curve, steepness),
    UNIT,
    UNIT,
    st.integers(0, 1000),
    st.integers(0, 300),
    st.sampled_from(Curve),
    st.floats(0.01, 50.0),
)


@given(RAMPS)
def test_both_ends_are_exact_and_hold(path):
    assert path.value(path.last_step) == path.value(path.last_step + 1) == path.value(10**9) == path.target
    if path.first_step < path.last_step:
        assert path.value(path.first_step) == path.value(0) == path.start


@given(RAMPS)
def test_values_are_monotone_and_between_the_ends(path):
    values = [path.value(step) for step in range(path.first_step, path.last_step + 1)]
    rising = path.target >= path.start
    low, high = min(path.start, path.target), max(path.start, path.target)
    for before, after in pairwise(values):
        assert (after >= before - 1e-12) if rising else (after <= before + 1e-12)
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)
    assert all(0.0 <= value <= 1.0 for value in values)


@given(RAMPS)
def test_mode_says_which_way(path):
    assert path.mode(path.last_step) is AlphaMode.HOLD
    if path.first_step < path.last_step:
        assert path.mode(path.last_step - 1) is (AlphaMode.UP if path.target >= path.start else AlphaMode.DOWN)


@given(st.integers(0, 40), st.integers(1, 40), st.sampled_from(Curve), st.floats(0.1, 30.0))
def test_curves_are_point_symmetric_about_the_middle(step, length, curve, steepness):
    path = ramp(first=0, last=length, curve=curve, steepness=steepness)
    step = min(step, length)
    assert path.progress(step) + path.progress(length - step) == pytest.approx(1.0)


@pytest.mark.parametrize("u", [0.1, 0.25, 0.5, 0.9])
def test_closed_forms(u):
    step = round(u * 1000)
    assert ramp(first=0, last=1000).value(step) == pytest.approx(u)
    cosine = ramp(first=0, last=1000, curve=Curve.COSINE).value(step)
    assert cosine == pytest.approx(math.sin(math.pi * u / 2) ** 2)
    k = 8.0
    sigmoid = ramp(first=0, last=1000, curve=Curve.SIGMOID, steepness=k).value(step)
    assert sigmoid == pytest.approx(0.5 * (1 + math.tanh(k * (2 * u - 1) / 2) / math.tanh(k / 2)))


@pytest.mark.parametrize("steps", [1000, 10**8])
def test_the_flattest_sigmoid_is_a_line_that_never_turns_back(steps):
    path = ramp(first=0, last=steps, curve=Curve.SIGMOID, steepness=STEEPNESS[0])
    for begin in (0, steps // 2, steps - 300):
        values = [path.value(step) for step in range(begin, begin + 301)]
        assert all(before < after for before, after in pairwise(values))
        assert values == pytest.approx([step / steps for step in range(begin, begin + 301)], abs=1e-5)


def test_a_ramp_down_between_other_ends():
    assert ramp(start=0.8, target=0.2).value(15) == pytest.approx(0.5)


def test_a_ramp_of_no_steps_is_its_target_at_once():
    path = ramp(start=0.3, target=0.9, first=7, last=7)
    assert [path.value(step) for step in (6, 7, 8)] == [0.3, 0.9, 0.9]
    assert path.mode(7) is AlphaMode.HOLD


@pytest.mark.parametrize("bad", [math.nan, math.inf, -0.01, 1.01, "1", None])
def test_alpha_must_be_finite_and_in_range(bad):
    with pytest.raises(ValueError, match="must be a finite number in"):
        check_alpha(bad)
    for name in ("start", "target"):
        with pytest.raises(ValueError, match=f"ramp.{name}"):
            ramp(**{name: bad})


def test_check_alpha_returns_a_float():
    assert type(check_alpha(1)) is float


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"first": 5, "last": 4}, "need 0 <= first <= last"),
        ({"first": -1}, "need 0 <= first <= last"),
        ({"steepness": 0.0}, "steepness"),
        ({"steepness": 1e-17}, "steepness = 1e-17: must be 0.01 to 50"),
        ({"steepness": 0.00999}, "steepness"),
        ({"steepness": math.nan}, "steepness"),
        ({"steepness": 51.0}, "steepness"),
    ],
)
def test_bad_ramps_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        ramp(**bad)


def test_wire_codes_stay_what_they_are():
    assert {item.name: item.value for item in (*Operator, *Curve, *AlphaMode)} == {
        "ADD": 0,
        "MULTIPLY": 1,
        "GATE": 2,
        "CONFIDENCE": 3,
        "CHANNEL": 4,
        "LINEAR": 0,
        "COSINE": 1,
        "SIGMOID": 2,
        "HOLD": 0,
        "UP": 1,
        "DOWN": 2,
    }
