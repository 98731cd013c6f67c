"""The game that attribution plays: plans which coalitions of seeds to measure, and how to combine their values. Pure.

Seeds are the players. A coalition, written as a bit mask, is the set of seeds that keep their alpha while the others
are at 0. Every quantity is a weighted sum of marginals v(S + seed) - v(S) of a value function v:

    coalition      v(S) - v(none)                   one seed: solo; all of them: together
    leave-one-out  v(all) - v(all but the seed)     blind to seeds that replace each other
    Shapley        the mean of the seed's marginal over all orders of joining; over seeds it sums to `together`

For up to four seeds Shapley values are exact, from all subsets. For more seeds they are means over drawn orders, each
paired with its reverse (antithetic): unbiased, exact for games of pairwise interactions alone, and the spread between
pairs gives the standard error. Castro, Gómez, Tejada 2009, "Polynomial calculation of the Shapley value based on
sampling"; Mitchell, Cooper, Frank, Holmes 2022, "Sampling Permutations for Shapley Value Estimation".
"""

import hashlib
import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from esper.leyline.alpha import check_alpha
from esper.leyline.errors import ConfigError
from esper.leyline.evidence import EXACT_SEEDS
from esper.leyline.slots import sort_slots


class QuantityKind(StrEnum):
    """The kinds of the table above; PAIR is the Shapley estimate from one order and its reverse."""

    COALITION = "coalition"
    LEAVE_ONE_OUT = "leave_one_out"
    SHAPLEY = "shapley"
    PAIR = "pair"


ASKED = (QuantityKind.COALITION, QuantityKind.LEAVE_ONE_OUT, QuantityKind.SHAPLEY)


class Quantity(NamedTuple):
    """One number per sample and unit: ``seeds`` is the coalition, or the one seed asked about."""

    kind: QuantityKind
    seeds: tuple[str, ...]
    pair: int | None = None


class Term(NamedTuple):
    """``weight * (v(coalition within) - v(coalition without))``; bit i of a coalition is seed i of the plan."""

    weight: float
    within: int
    without: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The coalitions and quantities to compute; equal on all ranks, and independent of data.

    Fields:
        levels: (slot, alpha when its seed takes part), row-major.
        pairs: number of drawn orders, each with its reverse; 0 means exact Shapley values.
        key: integers that the orders were drawn from.
        coalitions: bit masks, ascending; each is one output per batch.
        quantities: each quantity with its terms.
    """

    levels: tuple[tuple[str, float], ...]
    pairs: int
    key: tuple[int, ...]
    coalitions: tuple[int, ...]
    quantities: tuple[tuple[Quantity, tuple[Term, ...]], ...]

    def alphas(self, coalition: int) -> dict[str, float]:
        """Returns the alpha overrides that make the model this coalition."""
        return {slot: level if coalition >> i & 1 else 0.0 for i, (slot, level) in enumerate(self.levels)}


def _orders(seeds: int, pairs: int, key: Sequence[int]) -> list[list[int]]:
    """Draws ``pairs`` uniform orders, a pure function of the arguments; no other random stream moves."""
    text = "/".join(str(int(part)) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"esper.shapley").digest()
    stream = random.Random(int.from_bytes(digest, "big"))  # of its methods only random() is equal in every Python
    return [sorted(range(seeds), key=lambda _: stream.random()) for _ in range(pairs)]


def _exact_terms(seeds: int, seed: int) -> tuple[Term, ...]:
    """Terms of one seed's Shapley value over all subsets S of the others, with weight |S|! (n - |S| - 1)! / n!."""
    rest = [mask for mask in range(1 << seeds) if not mask >> seed & 1]
    return tuple(Term(1 / (seeds * math.comb(seeds - 1, s.bit_count())), s | 1 << seed, s) for s in rest)


def _join_term(order: Sequence[int], seed: int, weight: float) -> Term:
    """Term for the marginal of a seed when it joins those before it in ``order``."""
    before = sum(1 << other for other in order[: order.index(seed)])
    return Term(weight, before | 1 << seed, before)


def _groups(seeds: int, exact: bool) -> list[int]:
    """Coalitions to measure: all if Shapley values are ``exact``, else each seed alone and all together."""
    everyone = (1 << seeds) - 1
    return list(range(1, everyone + 1)) if exact else sorted({*(1 << i for i in range(seeds)), everyone})


def make_plan(
    levels: Mapping[str, float], *, pairs: int = 0, key: Sequence[int] = (0,), ask: Collection[QuantityKind] = ASKED
) -> Plan:
    """Plans coalitions, leave-one-out and Shapley values of some seeds.

    Args:
        levels: slot -> alpha at which its seed takes part. Seeds left out stay as they are throughout.
        pairs: 0 for exact Shapley values, up to four seeds; else the number of antithetic pairs of orders, at least 2
            for a standard error (below about 30 the error itself is rough, since a rare order may be missing).
        key: integers; equal keys draw equal orders (for example run seed and tick).
        ask: the kinds to measure; nothing else is run. Leave-one-out alone takes n + 1 forwards a batch for n seeds,
            without a bound on n. Without SHAPLEY, COALITION means each seed alone and all together.

    Raises:
        ConfigError: no seed, not a slot id, too many seeds for exact values, fewer than 2 pairs, or nothing asked.
        ValueError: an alpha is NaN or outside [0, 1].
    """
    slots = sort_slots(levels)
    chosen = tuple((slot, check_alpha(levels[slot], f"alpha of {slot}")) for slot in slots)
    n, everyone = len(slots), (1 << len(slots)) - 1
    if n == 0:
        raise ConfigError("attribution of no seeds: name at least one slot that holds a seed")
    if not ask or not set(ask) <= set(ASKED):
        raise ConfigError(f"ask = {sorted(ask)}: name one or more of {', '.join(ASKED)}")
    shapley = QuantityKind.SHAPLEY in ask
    if shapley and pairs == 0 and n > EXACT_SEEDS:
        raise ConfigError(f"pairs = 0: exact Shapley values go to {EXACT_SEEDS} seeds, got {n}; give pairs >= 2")
    if pairs < 0 or pairs == 1:
        raise ConfigError(f"pairs = {pairs}: need 0 (exact), or at least 2 for a standard error")
    wanted: dict[Quantity, tuple[Term, ...]] = {}
    for group in _groups(n, exact=shapley and pairs == 0) if QuantityKind.COALITION in ask else []:
        members = tuple(slot for i, slot in enumerate(slots) if group >> i & 1)
        wanted[Quantity(QuantityKind.COALITION, members)] = (Term(1.0, group, 0),)
    for i, slot in enumerate(slots if QuantityKind.LEAVE_ONE_OUT in ask else ()):
        wanted[Quantity(QuantityKind.LEAVE_ONE_OUT, (slot,))] = (Term(1.0, everyone, everyone & ~(1 << i)),)
    orders = _orders(n, pairs, key)
    for i, slot in enumerate(slots if shapley else ()):
        pair_terms = [(_join_term(order, i, 0.5), _join_term(order[::-1], i, 0.5)) for order in orders]
        for k, terms in enumerate(pair_terms):
            wanted[Quantity(QuantityKind.PAIR, (slot,), k)] = terms
        drawn_terms = tuple(term._replace(weight=term.weight / pairs) for terms in pair_terms for term in terms)
        wanted[Quantity(QuantityKind.SHAPLEY, (slot,))] = drawn_terms or _exact_terms(n, i)
    needed = {mask for terms in wanted.values() for _, within, without in terms for mask in (within, without)}
    return Plan(chosen, pairs, tuple(key), tuple(sorted(needed)), tuple(wanted.items()))
