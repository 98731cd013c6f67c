"""Levels: how improbable a seed's success must be by luck alone, fixed at its birth.

A run has many births, and 1 % of luck in each would fill its slots. Let birth j have the level

    level_j = false_share * g_j * (R_j + 1),    g_j = sqrt(2) (1 / sqrt(j + 1) - 1 / sqrt(j + 2)),    sum of all g_j = 1

with R_j the fossils that stand when it is born. A seed fossilises if its e-value reaches 1/level_j. This is e-LOND (Xu
and Ramdas, 2024, "Online multiple testing with e-values", AISTATS), and it bounds the expected share of false fossils
under any dependence, so births may overlap and share samples: with R fossils at the end,

    E[false / R] = sum_j E[1{E_j >= 1/level_j} / R] <= sum_j E[E_j level_j / (R_j + 1)] <= false_share sum_j g_j

over the births j that do not help, since E_j >= 1/level_j makes R >= R_j + 1, and E[E_j] <= 1. The g_j telescope. The
first birth has 0.1835 of ``false_share``: 0.92 % at the default of 5 %. R counts fossils that stand, so one that is
pruned later makes levels stricter; the share that is bounded is that of all fossils that ever were.

Within a life, evidence starts anew when alpha moves. The k-th start has a share of the level, 4/5, 4/25, 4/125, ...,
which sum to 1: the mixture of its starts' e-values with these weights is an e-value.
"""

import math

RARE = 0.01  # share of clusters


def spending(birth: int) -> float:
    """Returns g_j of the j-th birth, from 1."""
    return math.sqrt(2.0) * (1.0 / math.sqrt(birth + 1.0) - 1.0 / math.sqrt(birth + 2.0))


def level_of_birth(false_share: float, birth: int, fossils: int) -> float:
    """Returns the level of a birth, at most 1.

    Args:
        false_share: expected share of false fossils that a run may have.
        birth: number of this birth in the run, from 1.
        fossils: fossils that stand at that time.
    """
    return min(1.0, false_share * spending(birth) * (fossils + 1))


def share_of_start(start: int) -> float:
    """Returns the share of a level that the evidence of a life has which was started anew ``start`` times before."""
    return 0.8 * 0.2**start


def least_clusters(level: float) -> int:
    """Returns how many clusters must be seen before harm to 1 cluster in 100 cannot go unseen at ``level``.

    A seed that helps 99 of 100 and hurts one badly looks perfect until that one is drawn, which no statistic can mend:
    (1 - RARE)^n = level at n = log(1 / level) / -log(1 - RARE), 467 at 0.92 %. A probe of fewer clusters is read whole.
    """
    return math.ceil(math.log(1.0 / level) / -math.log1p(-RARE)) if level < 1.0 else 0
