"""Verdicts on losses: laws that hold for any numbers, against an independent estimator, and on curves as they are."""

import math
import statistics

import numpy
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from esper.accord.governor.config import GovernorConfig
from esper.accord.verdict import Series, Symptom, append_loss, chance_level, deviation, jump_limit, symptom_of

CONFIG = GovernorConfig()
LOSSES = st.lists(st.floats(1e-3, 10.0), min_size=CONFIG.min_history, max_size=CONFIG.history)
LOSS = st.floats(1e-3, 50.0)
CHANCE = math.log(10)
ORDER = [Symptom.NONE, Symptom.COLLAPSE, Symptom.DIVERGENCE]


def series(losses: list[float]) -> Series:
    found = Series()
    for loss in losses:
        found = append_loss(found, loss, CONFIG)
    return found


@given(LOSSES, LOSS, st.integers(-20, 20))
def test_the_scale_of_the_metric_changes_no_verdict(losses: list[float], loss: float, power: int) -> None:
    scale = 2.0**power  # exact in floating point
    scaled = series([scale * x for x in losses])
    assert symptom_of(scaled, scale * loss, scale * CHANCE, CONFIG, training=True) is symptom_of(
        series(losses), loss, CHANCE, CONFIG, training=True
    )


@given(LOSSES, LOSS, LOSS)
def test_a_higher_loss_is_never_judged_better(losses: list[float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    found = [
        symptom_of(series(losses), loss, CHANCE, CONFIG, training=True) is not Symptom.NONE for loss in (low, high)
    ]
    assert found[0] <= found[1]


@given(LOSSES, LOSS, st.randoms(use_true_random=False))
def test_only_which_losses_there_were_counts_not_their_order(losses: list[float], loss: float, random) -> None:  # type: ignore[no-untyped-def]
    mixed = losses[:]
    random.shuffle(mixed)
    a, b = (
        jump_limit(Series(losses=tuple(losses)), CHANCE, CONFIG),
        jump_limit(Series(losses=tuple(mixed)), CHANCE, CONFIG),
    )
    assert a == b


@given(LOSSES, st.integers(0, 6), st.floats(100.0, 1e30))
def test_less_than_half_of_the_losses_cannot_move_the_limit_far(losses: list[float], count: int, wild: float) -> None:
    """The breakdown point: a limit stays within what the sound losses span."""
    count = min(count, (len(losses) - 1) // 2)
    spoiled = Series(losses=(*losses[count:], *[wild] * count))
    span = max(losses) - min(losses)
    most = jump_limit(spoiled, CHANCE, CONFIG)
    assert most is not None
    assert most <= max(losses) + max(CONFIG.deviations * 1.4826 * span, CONFIG.rise * CHANCE)


@given(LOSSES)
def test_the_deviation_is_that_of_numpy(losses: list[float]) -> None:
    values = numpy.array(losses)
    wanted = 1.4826 * numpy.median(numpy.abs(values - numpy.median(values)))
    assert deviation(losses) == pytest.approx(wanted, rel=1e-12, abs=1e-12)


def test_of_normal_noise_it_is_the_standard_deviation() -> None:
    noise = numpy.random.default_rng(0).normal(2.0, 0.3, 20_000)
    assert deviation(noise.tolist()) == pytest.approx(0.3, rel=0.03)


def test_chance_is_the_entropy_of_the_targets() -> None:
    assert chance_level(list(range(10)) * 7) == pytest.approx(math.log(10))
    assert chance_level([3] * 5) == 0.0
    p = numpy.array([0.5, 0.25, 0.25])
    assert chance_level([0, 0, 1, 2]) == pytest.approx(float(-(p * numpy.log(p)).sum()))


def test_few_losses_say_nothing_but_that_chance_is_far() -> None:
    few, enough = series([1.0] * (CONFIG.min_history - 1)), series([1.0] * CONFIG.min_history)
    assert symptom_of(few, 1e9, CHANCE, CONFIG, training=False) is Symptom.NONE
    assert symptom_of(enough, 1e9, CHANCE, CONFIG, training=False) is Symptom.DIVERGENCE
    assert symptom_of(Series(), 1e9, CHANCE, CONFIG, training=True) is Symptom.NONE, "a first loss may be anything"
    for seen, most in ((1.0, CHANCE), (40.0, 40.0)):  # an unlucky start is measured by itself
        for loss, symptom in ((2.9 * most, Symptom.NONE), (3.1 * most, Symptom.DIVERGENCE)):
            assert symptom_of(series([seen]), loss, CHANCE, CONFIG, training=True) is symptom


def test_a_climb_that_widens_its_own_limit_is_a_blow_up() -> None:
    """Training at a rate that is far too high: each loss is in line with those before it, and all are hopeless."""
    climbing, jumps, found = series([2.3]), [], []
    for loss in numpy.geomspace(2.3, 80.0, 40):
        jumps.append(symptom_of(climbing, float(loss), CHANCE, CONFIG, training=False))
        found.append(symptom_of(climbing, float(loss), CHANCE, CONFIG, training=True))
        climbing = append_loss(climbing, float(loss), CONFIG)
    assert set(jumps) == {Symptom.NONE}
    assert found[-1] is Symptom.DIVERGENCE


@given(st.floats(0.01, 5.0), st.floats(0.0, 0.99))
def test_a_smooth_curve_may_still_rise_by_a_share_of_chance(level: float, share: float) -> None:
    flat = series([level] * CONFIG.history)
    assume(level + CONFIG.rise * CHANCE < CONFIG.collapse * CHANCE)
    assert symptom_of(flat, level + share * CONFIG.rise * CHANCE, CHANCE, CONFIG, training=True) is Symptom.NONE
    assert symptom_of(flat, level + 1.01 * CONFIG.rise * CHANCE, CHANCE, CONFIG, training=True) is Symptom.DIVERGENCE


def test_noise_widens_its_own_limit() -> None:
    rng = numpy.random.default_rng(1)
    calm, wild = (series(rng.normal(1.0, sd, CONFIG.history).clip(0.05).tolist()) for sd in (0.01, 0.4))
    assert symptom_of(calm, 1.8, CHANCE, CONFIG, training=True) is Symptom.DIVERGENCE
    assert symptom_of(wild, 1.8, CHANCE, CONFIG, training=True) is Symptom.NONE


def test_a_slow_return_to_chance_is_a_collapse_however_wide_its_limit_has_grown() -> None:
    """Divergence is blind to it: the trend widens the limit. A network that never knew more has not collapsed."""
    falling = series([2.3 - 0.1 * k for k in range(15)])
    assert falling.best is not None
    assert falling.best < CONFIG.clearly_better * CHANCE
    rising, found = falling, []
    for k in range(25):
        loss = min(CHANCE, 0.9 + 0.1 * k)
        symptom = symptom_of(rising, loss, CHANCE, CONFIG, training=True)
        found.append(symptom)
        rising = append_loss(rising, loss, CONFIG) if symptom is Symptom.NONE else rising  # as the judge does
    assert found[-1] is Symptom.COLLAPSE
    assert Symptom.DIVERGENCE not in found
    assert symptom_of(series([CHANCE] * 16), CHANCE, CHANCE, CONFIG, training=True) is Symptom.NONE


def test_the_best_is_the_lowest_median_and_never_forgotten() -> None:
    losses = [*numpy.linspace(2.0, 0.5, 20), *numpy.linspace(0.5, 1.5, 40)]
    found, medians = Series(), []
    for index, loss in enumerate(losses):
        found = append_loss(found, float(loss), CONFIG)
        window = [float(x) for x in losses[max(0, index + 1 - CONFIG.history) : index + 1]]
        if len(window) >= CONFIG.min_history:
            medians.append(statistics.median(window))
    assert found.best == min(medians)
    assert len(found.losses) == CONFIG.history
