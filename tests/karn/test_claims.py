"""How often a claim is told wrongly, against distributions whose truth is known; p-values against other estimators."""

import itertools
import re

import numpy as np
import pytest
from scipy import stats as oracle

from esper.karn.claims import judge_claims
from esper.karn.rows import Metric
from esper.karn.stats import holm, paired_difference, sign_test, t_test
from tests.karn.records import record

SEEDS = 10


def runs_of(scores: dict) -> dict:
    """Runs whose test losses are minus the scores given by arm, in nats."""
    return {
        arm: {seed: record([(10, 2.0), (20, 1.0)], test_loss=-value) for seed, value in enumerate(values)}
        for arm, values in scores.items()
    }


def judged(scores: dict, margin: float = 0.01) -> dict:
    room, controller = judge_claims(runs_of(scores), Metric.LOSS, "a", (), flops_share=0.75, margin=margin)
    return {claim.claim: claim for claim in (*room, *controller)}


def test_the_p_value_of_a_margin_is_scipys():
    random = np.random.default_rng(0)
    a, b = random.normal(0.02, 1, 9), random.normal(0, 1, 9)
    for bound in (0.0, -0.3):
        found = t_test(paired_difference(list(a), list(b)), bound)
        assert found == pytest.approx(oracle.ttest_rel(a - bound, b).pvalue, rel=1e-9)


def test_the_sign_test_counts_subsets():
    for n, k in ((10, 9), (10, 5), (7, 0)):
        tail = min(sum(sum(bits) >= k for bits in itertools.product((0, 1), repeat=n)),
                   sum(sum(bits) <= k for bits in itertools.product((0, 1), repeat=n)))  # fmt: skip
        assert sign_test(k, n) == pytest.approx(min(1.0, 2 * tail / 2**n))


@pytest.mark.parametrize("m", [1, 2, 5, 6])
def test_holm_is_the_closed_test_of_bonferroni(m):
    """A hypothesis falls if Bonferroni rejects every set of hypotheses that it is in (Marcus, Peritz, Gabriel 1976)."""
    random = np.random.default_rng(m)
    for _ in range(20):
        p = list(random.uniform(0, 1, m) ** 3)
        sets = [s for r in range(1, m + 1) for s in itertools.combinations(range(m), r)]
        closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(m)]
        assert holm(p) == pytest.approx(closed)
    assert holm([]) == []


def test_holm_is_that_of_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = list(np.random.default_rng(3).uniform(0, 0.2, 9))
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_an_arm_that_is_worse_by_the_margin_is_hardly_ever_called_not_behind():
    """Worse by one standard error, "not below by more than one" passes half the time; by the margin, 2.5 % at most."""
    random, margin = np.random.default_rng(5), 0.01
    told = old = 0
    for _ in range(800):
        schedule = random.normal(0, 0.02, SEEDS)
        a = schedule - margin + random.normal(0, margin * np.sqrt(SEEDS), SEEDS)  # SE = margin
        told += judged({"a": a, "schedule": schedule}, margin)["a is not behind schedule by 0.0100 nats"].holds is True
        difference = a - schedule
        old += difference.mean() > -difference.std(ddof=1) / np.sqrt(SEEDS)
    assert old / 800 > 0.45
    assert told / 800 <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / 800)


def test_any_wrong_claim_of_a_table_is_as_rare_as_one():
    """Every arm is the same but for luck: at most 5 % of tables tell a difference, where 2 SE tell one in a fifth."""
    random, wrong, naive = np.random.default_rng(6), 0, 0
    names = ("a", "none", "random", "final")
    for _ in range(600):
        scores = {arm: random.normal(0, 1, SEEDS) for arm in names}
        claims = [claim for text, claim in judged(scores).items() if " beats " in text]
        wrong += any(claim.holds is not None for claim in claims)
        differences = [scores[x] - scores[y] for x, y in (("a", "none"), ("a", "random"), ("final", "none"))]
        naive += any(abs(d.mean()) > 2 * d.std(ddof=1) / np.sqrt(SEEDS) for d in differences)
    assert naive / 600 > 0.12
    assert wrong / 600 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)


def test_no_claim_stands_that_its_interval_does_not_exclude():
    random, seen = np.random.default_rng(7), set()
    for _ in range(300):
        arms = ("a", "none", "random", "final")
        scores = {arm: random.normal(random.choice([-1, 0, 0, 1]), 0.8, SEEDS) for arm in arms}
        scores |= {"schedule": scores["a"] + random.normal(0, 0.02, SEEDS), "immediate": random.normal(0, 1, SEEDS)}
        for text, claim in judged(scores).items():
            if claim.p is None or "final's loss" in text:
                continue
            low, high = map(float, re.search(r"interval (\S+) to (\S+) over", claim.figure).groups())
            bound = -0.01 if "behind" in text else 0.0
            assert claim.holds is None or (low >= bound if claim.holds else high <= bound), (text, claim)
            assert claim.holds is (None if claim.p > 0.05 else low >= bound)
            seen.add((claim.holds, "behind" in text))
    assert len(seen) == 6
