"""Growth comes to rest where nothing helps: penalties grow with the failures of a blueprint in a slot."""

import itertools

import pytest

from esper.drill.births import run_without_help
from esper.leyline.stages import Incubation


@pytest.mark.parametrize("incubation", [Incubation.SHADOW, Incubation.IMMEDIATE])
def test_where_nothing_helps_births_become_rare(incubation: Incubation) -> None:
    born = run_without_help(1500, incubation=incubation).births
    assert 3 <= sum(tick <= 1000 for tick in born) <= 13, "some four tries of each of three blueprints"
    assert not [tick for tick in born if tick > 750]
    gaps = [later - earlier for earlier, later in itertools.pairwise(born)]
    assert sum(gaps[-3:]) > 3 * sum(gaps[:3])


def test_without_growing_penalties_it_goes_on_without_end() -> None:
    born = run_without_help(1000, incubation=Incubation.SHADOW, penalty_growth=1.0).births
    assert len(born) > 40
    assert max(born) > 950


def test_few_seeds_of_no_effect_are_held() -> None:
    runs = [run_without_help(250, incubation=Incubation.IMMEDIATE, seed=seed) for seed in range(12)]
    assert sum(run.fossils for run in runs) == 0
    assert sum(run.held for run in runs) <= 0.15 * sum(len(run.births) for run in runs), "5 % are expected"
