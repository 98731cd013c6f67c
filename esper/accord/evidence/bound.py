"""How strongly running sums speak against "the seed does not help": an e-value that is valid at any time.

An *e-value* has expectation at most 1 where the null hypothesis holds; by Ville's inequality it ever exceeds 1/level
with a chance of at most ``level``, however often and whenever one looks. Ours is a mixture of sequential probability
ratios of the studentised running sum (Robbins, 1970, Ann. Math. Statist. 41; Waudby-Smith, Arbour, Sinha, Kennedy and
Ramdas, 2024, Ann. Statist. 52, who show that such bounds hold for any distribution with enough moments as samples
become many). With G clusters seen, z their studentised mean minus the null's, and bets b_1 .. b_K fixed before the
first look:

    E = 1/K sum_k exp(b_k z sqrt(G) - b_k^2 G / 2),      b_k = sqrt(2 log(1/level) / H_k),   H_k = H, H/4, H/16, ...

b_k is the bet that needs the smallest z once H_k clusters are seen. H is what the evidence may see at most, and the
others are there so that a large probe need not be read whole to see a seed that helps much.

A seed learns, and its first looks may speak against it. So what is judged is a mixture over starts, with weights that
sum to 1 and are fixed beforehand: 1/2 for E over all looks, 1/4 for E over all but the first, 1/8 for all but the first
2, 1/16 for all but the first 4, and so on; a start that has not come yet counts as 1. Only the mean starts anew. Its
error and its skewness are taken from all looks, since harm that was seen once must not be forgotten.

Differences are skewed and clusters few, so z is made of t in two steps. The smaller of t and Hall's (1992, J. R.
Statist. Soc. B 54) skewness-corrected t is taken: a seed that helps a little on most samples and hurts a lot on a few
has a long lower tail, and t alone says "better" by luck far too often. Then Student's quantiles are turned into normal
ones (Wallace, 1959, Ann. Math. Statist. 30), with G - 1 degrees of freedom.

    t = (mean - null) / SE,   a = skew / (3 sqrt(G)),   corrected = ((1 + a t)^3 - 1) / (3 a) + a / 2
    z = sign(t) (8 f + 1) / (8 f + 3) sqrt(f log(1 + t^2 / f)),   f = G - 1

No tail is clipped. The tables of docs/gates.md say how often each kind of null passes, counted.
"""

import math
from collections.abc import Sequence

from esper.accord.evidence.sums import MIN_CLUSTERS, NOTHING, ClusterSums, Earlier, estimate

_SHORTEST = 460  # clusters: no bet is tuned to fewer, where the normal approximation is at its worst


def correct_skewness(t: float, skew: float, clusters: int) -> float:
    """Returns the smaller of t and Hall's transformation of t (see the module)."""
    a = skew / (3.0 * math.sqrt(clusters))
    return min(t, t + a * t * t + a * a * t**3 / 3.0 + a / 2.0)


def normal_score(t: float, df: int) -> float:
    """Returns the standard normal quantile that is as improbable as ``t`` is under Student's law (Wallace, 1959)."""
    size = (8.0 * df + 1.0) / (8.0 * df + 3.0) * math.sqrt(df * math.log1p(t * t / df))
    return math.copysign(size, t)


def score(sums: ClusterSums, null: float, earlier: Earlier = NOTHING) -> float | None:
    """Returns z, by how many standard errors the mean is above ``null``, corrected for skewness and few clusters.

    Args:
        sums: running sums.
        null: nats per sample.
        earlier: see `estimate`.

    Returns:
        None with fewer than two clusters; infinite if there is no spread at all.
    """
    found = estimate(sums, earlier)
    if found is None:
        return None
    above = found.mean - null
    if found.se == 0.0:
        return math.copysign(math.inf, above) if above else 0.0
    t = above / found.se
    if not math.isfinite(t):
        return t
    return normal_score(correct_skewness(t, found.skew, found.clusters), sums.clusters - 1)


def bets(horizon: int, level: float, shortest: int = _SHORTEST) -> tuple[float, ...]:
    """Returns b_1 .. b_K (see the module).

    Args:
        horizon: clusters that the evidence may see at most, H.
        level: chance of a false alarm, in (0, 1].
        shortest: the least H_k.
    """
    horizons = [float(max(1, horizon))]
    while horizons[-1] / 4.0 >= shortest:
        horizons.append(horizons[-1] / 4.0)
    return tuple(math.sqrt(2.0 * math.log(1.0 / level) / h) for h in horizons)


def log_evidence(
    sums: ClusterSums,
    starts: Sequence[Earlier] = (),
    *,
    null: float,
    horizon: int,
    level: float,
    shortest: int = _SHORTEST,
) -> float | None:
    """Returns log E against "the mean difference is at most ``null``"; None below `MIN_CLUSTERS` clusters.

    The evidence suffices where it is at least log(1 / level).

    Args:
        sums: running sums since the evidence began.
        starts: what the first 1, 2, 4, ... looks of it added up to, as far as there were so many.
        null: nats per sample.
        horizon: clusters that the evidence may see at most; fixed when it begins.
        level: chance of a false alarm, in (0, 1]; fixed when it begins.
        shortest: see `bets`.
    """
    if sums.clusters < MIN_CLUSTERS:
        return None
    terms, weight = [], 0.5
    for earlier in (NOTHING, *starts):
        one = _log_ratio(sums, earlier, null, bets(horizon - earlier.clusters, level, shortest))
        terms.append(math.log(weight) + one)
        weight /= 2.0
    terms.append(math.log(2.0 * weight))  # the starts to come
    return _log_sum(terms)


def _log_ratio(sums: ClusterSums, earlier: Earlier, null: float, mixed: Sequence[float]) -> float:
    """log E of one start: 0 before it has `MIN_CLUSTERS` clusters of its own."""
    clusters = sums.clusters - earlier.clusters
    z = score(sums, null, earlier) if clusters >= MIN_CLUSTERS else None
    if z is None:
        return 0.0
    terms = [bet * (z * math.sqrt(clusters) - bet * clusters / 2.0) if bet else 0.0 for bet in mixed]
    return _log_sum(terms) - math.log(len(terms))


def _log_sum(terms: Sequence[float]) -> float:
    top = max(terms)
    return top if math.isinf(top) else top + math.log(sum(math.exp(term - top) for term in terms))
