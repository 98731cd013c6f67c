"""The claims that a comparison may make, each with the figure that decides it. Pure functions of run records.

headroom     does the final topology, trained from the start, beat the host (same steps) and every fixed size
             between them (same FLOPs) by more than two standard errors? If not, capacity does not matter here: the
             experiment is *uninformative*, whatever the other rows say. A size that is no smaller than the grown
             network is left out; if none is left, the question stays open
controller   is it better than no growth and chance, no worse than fixed schedules, and cheaper than `final`?
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from esper.karn.rows import Metric, Runs, difference, ratios_to_final, shared_seeds
from esper.karn.stats import Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim about an arm.

    Fields:
        claim: the claim in words.
        holds: whether it holds; None if the runs cannot decide it.
        figure: the number that decides it, in words.
    """

    claim: str
    holds: bool | None
    figure: str


def _judge_difference(margin: Estimate | None, metric: Metric, claim: str, standard_errors: float) -> Claim:
    """Judges whether a difference exceeds so many standard errors; a negative number allows a loss of as many."""
    if margin is None or margin.se is None:
        return Claim(claim=claim, holds=None, figure="needs runs of both on two seeds or more")
    value = f"{margin.value * metric.scale:+.{metric.places}f} {metric.unit}"
    if margin.se > 1e-9 * abs(margin.value):
        in_se = margin.value / margin.se
        error = f"{margin.se * metric.scale:.{metric.places}f}"
        figure = f"{value}, standard error {error} over {margin.n} seeds ({in_se:+.1f} SE)"
        return Claim(claim=claim, holds=in_se > standard_errors, figure=figure)
    if margin.value == 0:
        return Claim(claim=claim, holds=standard_errors < 0, figure=f"no difference on any of {margin.n} seeds")
    # With coarse scores on few seeds a spread of zero is chance; it says nothing about the error of the difference.
    return Claim(
        claim=claim, holds=None, figure=f"all {margin.n} seeds differ by the same, {value}: more seeds are needed"
    )


def choose_smaller_sizes(runs: Runs, sizes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Chooses the fixed sizes that are smaller than `final`; returns them, and a note on each that is not.

    Parameters are means over the seeds that both have; a size without such a seed stays, and its claim stays open.
    """
    chosen, notes = [], []
    for size in sizes:
        seeds = shared_seeds(runs, size, "final")
        parameters, final = (sum(runs[arm][seed].parameters for seed in seeds) for arm in (size, "final"))
        if seeds and parameters >= final:
            means = f"{parameters / len(seeds):,.0f} against {final / len(seeds):,.0f} parameters"
            notes.append(f"{size} is no smaller than final here ({means}): not asked")
        else:
            chosen.append(size)
    return chosen, notes


def judge_headroom(runs: Runs, metric: Metric, sizes: Sequence[str]) -> list[Claim]:
    """Judges whether capacity matters: `final` against `none`, and against each smaller size at equal FLOPs."""
    return [
        _judge_difference(
            difference(runs, metric, "final", other), metric, f"final beats {other} by more than 2 SE", 2.0
        )
        for other in ("none", *sizes)
    ]


def make_claims(runs: Runs, metric: Metric, arm: str, *, flops_share: float) -> list[Claim]:
    """Judges a controller: better than no growth and chance, no worse than fixed schedules, cheaper than `final`."""
    judged = [
        _judge_difference(difference(runs, metric, arm, other), metric, f"{arm} beats {other} by more than 2 SE", 2.0)
        for other in ("none", "random")
    ]
    judged += [
        _judge_difference(
            difference(runs, metric, arm, other), metric, f"{arm} is not below {other} by more than 1 SE", -1.0
        )
        for other in ("schedule", "immediate")
    ]
    ratios = ratios_to_final(runs, arm)
    claim = f"{arm} reaches final's loss with at most {flops_share:g} of its FLOPs"
    if not ratios:
        return [*judged, Claim(claim=claim, holds=None, figure="needs runs of both")]
    median, total = statistics.median(ratios), len(ratios)
    middle = f"median {median:.2f}" if math.isfinite(median) else "not reached on half of the seeds or more"
    within, ever = sum(ratio <= flops_share for ratio in ratios), sum(map(math.isfinite, ratios))
    figure = f"{middle}; within {flops_share:g} on {within} of {total} seeds, ever on {ever} of {total}"
    return [*judged, Claim(claim=claim, holds=median <= flops_share, figure=figure)]
