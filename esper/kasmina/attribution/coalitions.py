"""The game that attribution plays: which coalitions of seeds to measure, and what is made of their values. Pure.

Seeds are the players. A coalition is the set of seeds that stand at their alpha while the others stand at 0, as a bit
mask. Every quantity is a weighted sum of marginals v(S + seed) - v(S) of a value function v:

    coalition      v(S) - v(none)                   one seed: solo; all of them: together
    leave-one-out  v(all) - v(all but the seed)     blind to seeds that stand in for each other
    Shapley        the mean of the seed's marginal over all orders of joining; over seeds it sums to `together`

To four seeds Shapley values are exact, from all subsets. Beyond, they are means over drawn orders, each taken together
with its reverse (antithetic): unbiased, exact already for games of pairwise interactions, and the spread between pairs
is the standard error. Castro, Gómez, Tejada 2009, "Polynomial calculation of the Shapley value based on sampling";
Mitchell, Cooper, Frank, Holmes 2022, "Sampling Permutations for Shapley Value Estimation".
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
from esper.leyline.slots import sort_slots

EXACT_SEEDS = 4  # 2**4 forwards a batch


class QuantityKind(StrEnum):
    """What a quantity asks; see the table above. PAIR is the Shapley estimate of one order and its reverse."""

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
    """What to compute; equal on all ranks, and never dependent on data.

    Fields:
        levels: (slot, alpha when it takes part), row-major.
        pairs: drawn orders, each with its reverse; 0 means exact Shapley values.
        key: what the orders were drawn by.
        coalitions: each is one output per batch; ascending.
        quantities: each with its terms.
    """

    levels: tuple[tuple[str, float], ...]
    pairs: int
    key: tuple[int, ...]
    coalitions: tuple[int, ...]
    quantities: tuple[tuple[Quantity, tuple[Term, ...]], ...]

    def alphas(self, coalition: int) -> dict[str, float]:
        """The overrides under which the model is this coalition."""
        return {slot: level if coalition >> i & 1 else 0.0 for i, (slot, level) in enumerate(self.levels)}


def _orders(seeds: int, pairs: int, key: Sequence[int]) -> list[list[int]]:
    """``pairs`` uniform orders, a pure function of the arguments; no other random stream moves."""
    text = "/".join(str(int(part)) for part in key)
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"esper.shapley").digest()
    stream = random.Random(int.from_bytes(digest, "big"))  # only random() is promised to be equal in every Python
    return [sorted(range(seeds), key=lambda _: stream.random()) for _ in range(pairs)]


def _exact(seeds: int, seed: int) -> tuple[Term, ...]:
    """The Shapley value of one seed over all subsets S of the others, weight |S|! (n - |S| - 1)! / n!."""
    rest = [mask for mask in range(1 << seeds) if not mask >> seed & 1]
    return tuple(Term(1 / (seeds * math.comb(seeds - 1, s.bit_count())), s | 1 << seed, s) for s in rest)


def _joining(order: Sequence[int], seed: int, weight: float) -> Term:
    """The marginal of a seed when it joins those before it in ``order``."""
    before = sum(1 << other for other in order[: order.index(seed)])
    return Term(weight, before | 1 << seed, before)


def _groups(seeds: int, exact: bool) -> list[int]:
    """Coalitions that are asked about: all, or where Shapley values are drawn each seed alone and all together."""
    everyone = (1 << seeds) - 1
    return list(range(1, everyone + 1)) if exact else sorted({*(1 << i for i in range(seeds)), everyone})


def make_plan(
    levels: Mapping[str, float], *, pairs: int = 0, key: Sequence[int] = (0,), ask: Collection[QuantityKind] = ASKED
) -> Plan:
    """Plans coalitions, leave-one-out and Shapley values of some seeds.

    Args:
        levels: slot -> alpha at which its seed takes part. Seeds left out stay as they are throughout.
        pairs: 0 for exact Shapley values, up to four seeds; else antithetic pairs of orders, at least 2 for an error
            (with fewer than some 30 the error itself is rough: a rare order may be missing from it).
        key: integers; equal keys draw equal orders (for example run seed and tick).
        ask: what to measure, nothing else is run: leave-one-out alone is n + 1 forwards a batch for n seeds, and has no
            bound on n. Without SHAPLEY, COALITION means each seed alone and all together.

    Raises:
        ConfigError: no seed, not a slot id, exact for too many seeds, fewer than 2 pairs, nothing asked.
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
        twice = [(_joining(order, i, 0.5), _joining(order[::-1], i, 0.5)) for order in orders]
        for k, two in enumerate(twice):
            wanted[Quantity(QuantityKind.PAIR, (slot,), k)] = two
        drawn = tuple(term._replace(weight=term.weight / pairs) for two in twice for term in two)
        wanted[Quantity(QuantityKind.SHAPLEY, (slot,))] = drawn or _exact(n, i)
    needed = {mask for terms in wanted.values() for _, within, without in terms for mask in (within, without)}
    return Plan(chosen, pairs, tuple(key), tuple(sorted(needed)), tuple(wanted.items()))
