"""How often luck passes the gates, and how often help does: counted over lives whose probes' answers are drawn.

The tables of docs/gates.md are counted likewise over more lives: ``python launch/bench.py gates``.
"""

import numpy as np
import pytest

from esper.accord.config import GateConfig
from esper.accord.evidence.levels import level_of_birth
from esper.drill.luck import (
    CLUSTERED,
    NULLS,
    SLOT,
    begin,
    count_lives,
    count_runs,
    cut_looks,
    draw_sample,
    live,
    plan_for,
    terms_of,
    weighed,
)
from esper.leyline.stages import Incubation, Stage

GATES, FIRST = GateConfig(), level_of_birth(0.05, 1, 0)
FEW, RARE = "helps most, hurts few (lognormal, skew -6)", "hurts 1 in 100, helps the others"


def count(kind: str, lives: int, *, probe: int = 1024, mean: float = 0.0, level: float = FIRST) -> int:
    rng, passed = np.random.default_rng([3, *kind.encode()]), 0
    for _ in range(lives):
        sample = draw_sample(kind, rng, probe, mean)
        plan = plan_for(sample, GATES)
        passed += weighed(cut_looks(sample, plan, rng), plan, GATES, level)
    return passed


@pytest.mark.parametrize("kind", ["normal", FEW, RARE, CLUSTERED])
def test_of_seeds_that_do_not_help_fewer_than_one_percent_would_fossilise(kind):
    assert count(kind, 600) <= 11, "6 are expected at 1 %, and 11 or fewer in 98 of 100 such samples"


def test_a_probe_too_small_for_rare_harm_is_as_weak_as_the_docs_say():
    assert pytest.approx(0.021, abs=5e-4) == 0.99**384
    assert 3 <= count(RARE, 500, probe=384) <= 20


@pytest.mark.parametrize(("mean", "least"), [(0.10, 0.40), (0.15, 0.85)])
def test_seeds_that_help_are_seen_on_a_probe_of_1024(mean, least):
    assert count("normal", 200, mean=mean) / 200 >= least


def test_at_the_fiftieth_birth_less_luck_is_allowed_and_help_is_still_seen():
    assert count(FEW, 200, level=level_of_birth(0.05, 50, 0)) == 0
    assert count("normal", 60, mean=0.2, level=level_of_birth(0.05, 50, 0)) > 48


def test_over_a_run_of_births_the_share_of_false_fossils_is_bounded():
    found = count_runs(FEW, 12, births=20, probe=512, helping=0.3)
    assert found.true_fossils > 1.0
    assert found.false_share < 0.05


def test_the_reducer_says_what_the_evidence_says():
    rng, ends = np.random.default_rng(9), []
    for mean in (0.0, 0.1, 0.2) * 7:
        sample = draw_sample("normal", rng, 1024, mean)
        plan = plan_for(sample, GATES)
        looks, terms = cut_looks(sample, plan, rng), terms_of(plan, GATES, Incubation.IMMEDIATE)
        begun = begin(terms)
        assert begun.slot(SLOT).level == FIRST
        ends.append(live(begun, terms, looks) is Stage.FOSSILIZED)
        assert ends[-1] == weighed(looks, plan, GATES, FIRST)
    assert 0 < sum(ends) < len(ends)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("kind", [*NULLS, CLUSTERED])
def test_whole_lives_by_the_reducer(kind):
    for incubation in (Incubation.IMMEDIATE, Incubation.SHADOW):
        found = count_lives(kind, 600, probe=1024, incubation=incubation)
        assert found.g5 / found.lives < 0.01
        assert incubation is Incubation.IMMEDIATE or found.g2 / found.lives < 0.05 or kind == RARE
