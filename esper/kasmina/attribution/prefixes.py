"""Sharing of prefixes: the forwards of a plan share what comes before the first slot in which they differ. Pure.

Coalitions that agree on all slots before one share the forward up to that slot (see `esper.kasmina.hosts.resume`), so
the work is a tree: a part of the forward per edge, an output per leaf. Leave-one-out of three seeds, in the order of
execution a, b, c (1: at its alpha, 0: at 0):

    x ──── a ─1─ b ─1─ c ─1─ 111
           │     │     └─0─ 110          parts: x→a, a→b and b→c once each, then four ends:
           │     └─0─────── 101                 two from c, one from b, one from a
           └─0───────────── 011

`forward_parts` lists the edges in an order that needs only a stack of states to run them. `account` counts them for a
FLOP account: the host's operations between two slots, and the seeds that join there.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from esper.kasmina.attribution.coalitions import Plan


class How(StrEnum):
    """SHARED: the tree above. STACKED: once to the first slot, then coalitions along the batch. FULL: one by one."""

    SHARED = "shared"
    STACKED = "stacked"
    FULL = "full"


@dataclass(frozen=True, slots=True)
class ForwardPart:
    """One edge of the tree.

    Fields:
        depth: number of parts above it; its input is the state left by the last part run at ``depth - 1``.
        start: slot at which it begins, None at the input.
        until: slot before which it ends, None at the output.
        coalitions: the coalitions that run through it; they agree on every slot before ``until``.
    """

    depth: int
    start: str | None
    until: str | None
    coalitions: tuple[int, ...]


class Entry(NamedTuple):
    """One kind of part: the host from ``start`` to before ``until``, and the plan's seeds that join there."""

    start: str | None
    until: str | None
    seeds: tuple[str, ...]


def forward_parts(plan: Plan, order: Sequence[str] | None) -> tuple[ForwardPart, ...]:
    """Lists the parts to run for one batch, each after the one that its state comes from.

    Args:
        plan: the coalitions.
        order: the host's slots in the order of execution; None if the host cannot resume, so that every coalition is
            one full forward.
    """
    if order is None:
        return tuple(ForwardPart(0, None, None, (coalition,)) for coalition in plan.coalitions)
    bits = {slot: i for i, (slot, _) in enumerate(plan.levels)}
    players = [(slot, bits[slot]) for slot in order if slot in bits]

    def walk(depth: int, start: str | None, group: tuple[int, ...], first: int) -> Iterator[ForwardPart]:
        differing = (i for i in range(first, len(players)) if len({mask >> players[i][1] & 1 for mask in group}) > 1)
        place = next(differing, None)
        until = None if place is None else players[place][0]
        yield ForwardPart(depth, start, until, group)
        if place is not None:
            for value in (0, 1):
                half = tuple(mask for mask in group if mask >> players[place][1] & 1 == value)
                yield from walk(depth + 1, until, half, place + 1)

    return tuple(walk(0, None, plan.coalitions, 0))


def account(
    plan: Plan, order: Sequence[str] | None, how: How = How.SHARED, asking: Collection[str] = ()
) -> Counter[Entry]:
    """Counts how often each kind of part runs per sample.

    A seed at alpha 0 does not run. FLOPs of an attribution are the sum over entries of count times samples times
    (the host's FLOPs between the two slots + those of the seeds).

    Args:
        plan: the coalitions.
        order: as for `forward_parts`.
        how: STACKED shares only what comes before the plan's first slot.
        asking: slots whose active seed costs one more full forward, without all such seeds; seeds that are not in the
            plan are always active. Nothing can be shared then: ``order`` is None.
    """
    counts: Counter[Entry] = Counter()
    levels = dict(plan.levels)
    sequence = [slot for slot in order or levels if slot in levels]
    work = forward_parts(plan, order)
    if how is How.STACKED and order is not None:
        work = (ForwardPart(0, None, sequence[0], plan.coalitions),)
        work += tuple(ForwardPart(1, sequence[0], None, (coalition,)) for coalition in plan.coalitions)
    for part in work:
        first = 0 if part.start is None else sequence.index(part.start)
        last = len(sequence) if part.until is None else sequence.index(part.until)
        alphas = plan.alphas(part.coalitions[0])
        seeds = tuple(slot for slot in sequence[first:last] if alphas[slot] > 0.0)
        counts[Entry(part.start, part.until, seeds)] += 1
        if any(slot in seeds or slot not in levels for slot in asking):
            counts[Entry(None, None, tuple(slot for slot in seeds if slot not in asking))] += 1
    return counts
