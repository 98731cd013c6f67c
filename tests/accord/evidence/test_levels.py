"""Levels of births: their sum is bounded whatever happens, and the first one is what the docs say."""

import math

import pytest

from esper.accord.evidence.levels import least_clusters, level_of_birth, share_of_start, spending


def test_what_births_spend_adds_up_to_one_and_never_more():
    total = 0.0
    for birth in range(1, 20_001):
        total += spending(birth)
        assert 0.0 < spending(birth) < (spending(birth - 1) if birth > 1 else 1.0)
        assert total <= 1.0
    assert total == pytest.approx(1.0 - math.sqrt(2.0 / 20_002.0))


def test_the_first_birth_has_less_than_one_percent_and_each_fossil_earns_as_much_again():
    assert level_of_birth(0.05, 1, 0) == pytest.approx(0.05 * (1 - math.sqrt(2 / 3)))
    assert level_of_birth(0.05, 1, 0) == pytest.approx(0.00918, abs=1e-5)
    assert level_of_birth(0.05, 9, 3) == pytest.approx(4 * level_of_birth(0.05, 9, 0))
    assert level_of_birth(0.9, 1, 40) == 1.0


def test_the_starts_of_a_life_share_its_level():
    assert sum(share_of_start(start) for start in range(60)) == pytest.approx(1.0)
    assert share_of_start(0) == pytest.approx(0.8)


@pytest.mark.parametrize("level", [0.05, 0.00918, 1e-4])
def test_so_many_clusters_are_asked_for_that_one_bad_one_in_a_hundred_is_drawn(level):
    least = least_clusters(level)
    assert 0.99**least <= level < 0.99 ** (least - 1)
    assert least_clusters(0.01) == 459
    assert least_clusters(1.0) == 0
