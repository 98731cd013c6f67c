"""Whether a seed's help will last: evidence against a host that goes on training, not against one that stands still.

Leaving a seed out of a network that has grown used to it measures reliance; a host at an early stage is helped by
anything that makes it learn faster. Both fade when the host is given the same further steps. So the network is
continued in throw-away copies, with the seed and without it, on the same batches, and compared at two marks:

    d1, d2      loss without minus loss with the seed, in nats per sample, after n1 and after n2 > n1 further steps
    r = d2/d1   what is left of the help after n2 - n1 steps; at most 1, since growth of help is not counted on
    d(k)        d2 * r^k: the help k spans of n2 - n1 steps later, where the lead of one learning curve over another
                shrinks geometrically

    log d(k) = (1 + k) log d2 - k log d1
    var      = (1 + k)^2 V2/d2^2 + k^2 V1/d1^2 - 2 k (1 + k) C12/(d1 d2)        (delta method)

V and C are those of means over clusters (see `esper.accord.evidence.sums`), plus the spread between two continuations
with other orders of batches. A gate reads the lower end.

A lead may also grow for a while, as long as the host is at its beginning, and be gone at the end. So the lead must be
more than the host is still to gain by itself. Its loss falls by g from one mark to the other; a learning curve that
falls as 1/t, which is slower than most, has at step t of T still to gain

    rest = g / (n2 - n1) * t * (1 - t / T)

and there is no verdict before d2 > rest. As rest shrinks with t, the step from which on that is to be expected follows,
and it is not asked again before. Measured against copies that were trained to the end of a run, and against three other
kinds of evidence: docs/gates.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

NAMES = (
    "clusters",
    "count",
    "sum1",
    "sum2",
    "sq1",
    "sq2",
    "cross",
    "size1",
    "size2",
    "size_sq",
    "half1",
    "half2",
    "host1",
    "host2",
)
"""Sums over clusters of n samples whose d1 and d2, means over both continuations, add up to s1 and s2: of 1, n, s1, s2,
s1^2, s2^2, s1 s2, s1 n, s2 n, n^2; and over samples, of half the difference between both continuations, and of the loss
without the seed, at each mark."""


SPENT = ("trained_kept", "judged_kept", "trained_without", "judged_without")
"""Samples that copies were trained on since the last tick, and probe samples that they were judged on: of copies with
the seed, and of copies without it."""

COPIES = 4
"""With the seed and without it, on two orders of batches."""


def marks_of(further_steps: int) -> tuple[int, int]:
    """Returns n1 and n2: copies are compared after three tenths of their steps, and after all."""
    return max(1, 3 * further_steps // 10), further_steps


@dataclass(frozen=True, slots=True, kw_only=True)
class LastingHelp:
    """What two continuations say of a seed; nats per sample.

    Fields:
        tick: control tick at which they were measured.
        first: mean of d1.
        last: mean of d2.
        expected: d at the end of the time looked at; the smaller of both means where one is not positive.
        lower: lower end of the one-sided interval of ``expected``.
        rest: what the host is expected still to gain by itself.
        retry_step: optimizer step from which on ``last`` is expected to be more than ``rest``.
        clusters: clusters of the probe.
        ahead: optimizer steps that were looked ahead, those of the copies included.
    """

    tick: int
    first: float
    last: float
    expected: float
    lower: float
    rest: float
    retry_step: int
    clusters: int
    ahead: int

    @property
    def is_early(self) -> bool:
        """Whether the host may still get by itself to where the seed has brought it."""
        return 0.0 < self.last <= self.rest

    def __str__(self) -> str:
        return (
            f"{self.first:.4g}, then {self.last:.4g} beside a host that goes on, at least {self.lower:.4g} after "
            f"{self.ahead} steps; the host is still to gain {self.rest:.4g} by itself"
        )


def judge_lasting(
    sums: Mapping[str, float], *, tick: int, step: int, total: int, marks: tuple[int, int], ahead: int, se: float
) -> LastingHelp | None:
    """Extrapolates the help of a seed to the end of the time that is left.

    Args:
        sums: `NAMES`, added over ranks.
        tick: present control tick.
        step: optimizer steps of the network that was continued.
        total: optimizer steps of the run.
        marks: n1 < n2, in optimizer steps.
        ahead: optimizer steps from now to the end of the time looked at.
        se: standard errors between ``expected`` and ``lower``, on the scale of the logarithm.

    Returns:
        None with fewer than two clusters, or if a sum is not finite.
    """
    clusters, n = int(sums["clusters"]), sums["count"]
    if clusters < 2 or not all(math.isfinite(sums[name]) for name in NAMES):
        return None
    d1, d2 = sums["sum1"] / n, sums["sum2"] / n
    half1, half2 = sums["half1"] / n, sums["half2"] / n
    scale = clusters / (clusters - 1) / (n * n)
    square1 = sums["sq1"] - 2 * d1 * sums["size1"] + d1 * d1 * sums["size_sq"]
    square2 = sums["sq2"] - 2 * d2 * sums["size2"] + d2 * d2 * sums["size_sq"]
    product = sums["cross"] - d2 * sums["size1"] - d1 * sums["size2"] + d1 * d2 * sums["size_sq"]
    v1, v2 = max(0.0, square1) * scale + half1 * half1, max(0.0, square2) * scale + half2 * half2
    c12 = product * scale + half1 * half2
    if d1 <= 0 or d2 <= 0:
        expected = min(d1, d2)
        lower = expected - se * math.sqrt(max(v1, v2))
    else:
        spans = max(0.0, (ahead - marks[1]) / (marks[1] - marks[0])) if d2 < d1 else 0.0
        log_expected = (1 + spans) * math.log(d2) - spans * math.log(d1)
        variance = ((1 + spans) / d2) ** 2 * v2 + (spans / d1) ** 2 * v1
        variance -= 2 * spans * (1 + spans) / (d1 * d2) * c12
        expected = math.exp(log_expected)
        lower = math.exp(log_expected - se * math.sqrt(max(0.0, variance)))
    gain = max(0.0, sums["host1"] - sums["host2"]) / n / (marks[1] - marks[0])
    now = step + marks[1]
    rest = gain * now * max(0.0, 1 - now / total)
    retry = now
    if 0.0 < d2 <= rest:  # rest * now / (1 - now / total) * (1 / t - 1 / total) = d2
        retry = math.ceil(1 / (1 / total + d2 * (1 - now / total) / (rest * now)))
    return LastingHelp(
        tick=tick,
        first=d1,
        last=d2,
        expected=expected,
        lower=lower,
        rest=rest,
        retry_step=retry,
        clusters=clusters,
        ahead=max(ahead, marks[1]),
    )
