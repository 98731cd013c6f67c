"""What an all-reduce over many ranks takes: gloo's ring, as a formula and message by message.

gloo cuts a vector into two segments a rank (more, where one would be longer than `LONGEST`). In each of two phases, of
sums and of results, a rank hands ``2 (N - 1)`` segments to its neighbour, each one place after it has come from the
other neighbour, with two in flight. Segments past the end of a short vector are not sent, but those that are travel the
whole ring: a short vector goes through ``2 (N - 1)`` places, whatever its length. A message is three writes: the sender
says that it has something, the receiver that it waits for it, and only then does the segment follow (`WRITES`). The
algorithm is that of gloo/allreduce.cc where the caller names none, as `torch.distributed` does;
tests/drill/test_ring.py counts its writes.
"""

from dataclasses import dataclass
from math import ceil, exp, isqrt
from typing import Any

import numpy as np

from esper.leyline.fields import Checks

ELEMENT = 8  # bytes of a float64, or an int64
LONGEST = 1 << 20  # bytes of a segment
WRITES = (2, 1)  # of a message: by its sender, by its receiver


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What a message between two neighbours costs.

    Fields:
        latency_s: seconds on one way, the wake-up of whoever waits included; the median.
        cpu_s: seconds of a core for sending one message and taking one in.
        bytes_per_s: bandwidth.
        spread: standard deviation of the logarithm of the latency; 0 for messages that all take the same.
    """

    latency_s: float
    cpu_s: float
    bytes_per_s: float
    spread: float = 0.0

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("latency_s", "cpu_s", "spread"):
                check(name, getattr(self, name) >= 0, "must be >= 0")
            check("bytes_per_s", self.bytes_per_s > 0, "must be > 0")


@dataclass(frozen=True, slots=True)
class Segments:
    """How a vector is cut.

    Fields:
        per_rank: segments that a rank owns, those past the end of the vector included.
        size: bytes of a segment but the last one.
        sent: segments that hold something.
    """

    per_rank: int
    size: int
    sent: int


def cut(ranks: int, size: int) -> Segments:
    """How ``size`` bytes are cut for so many ranks."""
    per_rank = max(2, ceil(ceil(size / LONGEST) / ranks))
    segment = ELEMENT * ceil(ceil(size / (per_rank * ranks)) / ELEMENT)
    return Segments(per_rank, segment, ceil(size / segment))


def messages_sent(ranks: int, rank: int, size: int) -> int:
    """Messages that a rank sends in one all-reduce: in sums all segments but its own, in results all but one rank's."""
    cuts = cut(ranks, size)

    def kept(owner: int) -> int:
        first = owner % ranks * cuts.per_rank
        return max(0, min(cuts.sent, first + cuts.per_rank) - first)

    return 2 * cuts.sent - kept(rank) - kept(rank - 1)


def writes(ranks: int, rank: int, size: int) -> int:
    """Writes into sockets that one all-reduce costs a rank."""
    sends, takes = messages_sent(ranks, rank, size), messages_sent(ranks, (rank + 1) % ranks, size)
    return WRITES[0] * sends + WRITES[1] * takes


def ring_seconds(ranks: int, size: int, link: Link) -> float:
    """Seconds of one all-reduce by formula.

    A segment goes one place in ``max((1 + f^2) latency + cpu + bytes / bandwidth, messages in flight * cpu)``, and a
    phase has ``N - 1`` such places. ``f`` is the share of segments that hold something: where all do, a sender waits to
    hear that its neighbour waits; where few do, ranks run ahead and have said so long before. Within a quarter of
    `ring_simulated` from 8 to 4,096 ranks at a spread up to 0.3; above that too little, since whoever is late in a ring
    holds up those behind.

    Args:
        ranks: number of ranks, N.
        size: bytes of the vector.
        link: between neighbours.
    """
    if ranks == 1:
        return 0.0
    cuts = cut(ranks, size)
    full = cuts.sent / (cuts.per_rank * ranks)
    mean = link.latency_s * exp(link.spread**2 / 2)
    place = (1 + full**2) * mean + link.cpu_s + cuts.size / link.bytes_per_s
    place = max(place, full * cuts.per_rank * link.cpu_s)
    return (ranks - 1) * place * cuts.per_rank


def ring_simulated(ranks: int, size: int, link: Link, *, seed: int = 0) -> float:
    """Seconds of one all-reduce, every message of every rank by itself.

    Args:
        ranks: number of ranks.
        size: bytes of the vector.
        link: between neighbours; each message draws its latency from a log-normal distribution.
        seed: of these draws.
    """
    cuts, draws = cut(ranks, size), np.random.default_rng(seed)
    own, total = np.arange(ranks), cuts.per_rank * ranks
    free = np.zeros(ranks)  # when each rank's thread is free

    def way() -> "np.ndarray[Any, np.dtype[np.float64]]":
        return link.latency_s * np.exp(link.spread * draws.standard_normal(ranks))

    for phase in (1, 0):  # sums, then results
        arrived = np.zeros((2, ranks))  # at each rank, of its last two messages
        real = np.zeros((2, ranks), dtype=bool)
        for i in range(total - cuts.per_rank + 2):
            turn = i % 2
            if i >= 2:  # waits for what was sent to it two turns ago
                free = np.where(real[turn], np.maximum(free, arrived[turn]) + link.cpu_s / 2, free)
            if i < total - cuts.per_rank:
                sends = ((own + phase) * cuts.per_rank + i) % total < cuts.sent
                asked = free + way()  # that it waits is known to its sender, rank + 1
                free = free + np.where(sends, link.cpu_s / 2, 0.0)
                sent = np.maximum(free, np.roll(asked, 1)) + way() + cuts.size / link.bytes_per_s
                arrived[turn], real[turn] = np.roll(sent, -1), np.roll(sends, -1)
    return float(free.max())


def tree_seconds(ranks: int, size: int, link: Link) -> float:
    """Seconds of one all-reduce by recursive doubling, which gloo lacks: ``log2 N`` exchanges of the whole vector."""
    mean = link.latency_s * exp(link.spread**2 / 2)
    return (ranks - 1).bit_length() * (2 * mean + link.cpu_s + size / link.bytes_per_s)


def grid_seconds(ranks: int, size: int, link: Link) -> float:
    """Seconds of a ring over each row of a square of ranks, then over each column: ``4 (sqrt(N) - 1)`` places."""
    rows = max(d for d in range(1, isqrt(ranks) + 1) if ranks % d == 0)
    return ring_seconds(rows, size, link) + ring_seconds(ranks // rows, size, link)
