"""The claims that a comparison may make, each with the figure that decides it. Pure functions of run records.

headroom     does the final topology, trained from the start, beat the host (same steps) and every fixed size
             between them (same FLOPs)? If one of these is shown to be better, capacity does not matter here: the
             experiment is *uninformative*, whatever the other rows say. A size that is no smaller than the grown
             network is left out; if none is left, the question stays open
controller   is it better than no growth and chance, not worse than fixed schedules by as much as a margin, and cheaper
             than `final`?

A claim says that a mean difference over seeds, paired, lies above a bound: 0, or minus the margin, which the comparison
fixes beforehand (non-inferiority: Schumi and Wittes 2011, "Through the looking glass"). It is tested by Student's t, in
both directions; the claim on FLOPs by the exact sign test. For all claims of a table together Holm (1979) bounds the
chance that any of them is settled by luck at 5 %. So there are three answers:

    True     shown: the data exclude the opposite
    False    refuted: the data exclude the claim
    None     open: they exclude neither

Whatever is shown or refuted here, the plain 95 % interval of its figure excludes the other answer, too.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from esper.karn.rows import Metric, Runs, difference, ratios_to_final, shared_seeds
from esper.karn.stats import Estimate, holm, sign_test, t_test

LEVEL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One claim about an arm.

    Fields:
        claim: the claim in words.
        holds: whether it is shown (True) or refuted (False); None if the runs exclude neither.
        figure: the numbers that decide it, in words.
        p: two-sided p-value of its bound, adjusted for the other claims of the table; None if it was not tested.
    """

    claim: str
    holds: bool | None
    figure: str
    p: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Question:
    """A claim before the others are known: its own p-value (None: not asked), and the side on which the data lie."""

    claim: str
    figure: str
    p: float | None = None
    above: bool = False
    tested: bool = True


def _ask_difference(runs: Runs, metric: Metric, arm: str, other: str, claim: str, *, margin: float = 0.0) -> _Question:
    """Asks whether ``arm`` is better than ``other``, or with a margin (in units of the score) not worse by as much."""
    found = difference(runs, metric, arm, other)
    if found is None or found.se is None:
        return _Question(claim=claim, figure="needs runs of both on two seeds or more")
    seeds = f"{found.n} seeds"
    if found.se <= 1e-9 * abs(found.value):
        # With coarse scores on few seeds a spread of zero is chance; it says nothing about the error of the difference.
        told = f"by the same, {metric.tell(found.value)}" if found.value else "by nothing"
        return _Question(claim=claim, figure=f"all {seeds} differ {told}: more seeds are needed", p=1.0, tested=False)
    return _Question(
        claim=claim,
        figure=f"{_interval(found, metric)} over {seeds}",
        p=t_test(found, -margin),
        above=found.value > -margin,
    )


def _points(value: float, metric: Metric) -> str:
    return f"{value * metric.scale:+.{metric.places}f}"


def _interval(found: Estimate, metric: Metric) -> str:
    """``+0.12 points, 95 % interval -0.64 to +0.88``."""
    assert found.low is not None
    assert found.high is not None
    low, high = _points(found.low, metric), _points(found.high, metric)
    return f"{metric.tell(found.value)}, 95 % interval {low} to {high}"


def _ask_cost(runs: Runs, arm: str, flops_share: float) -> _Question:
    """Asks whether on most seeds ``arm`` reaches the loss of `final` within a share of its FLOPs."""
    claim = f"{arm} reaches final's loss with at most {flops_share:g} of its FLOPs"
    ratios = ratios_to_final(runs, arm)
    if not ratios:
        return _Question(claim=claim, figure="needs runs of both")
    median, total = statistics.median(ratios), len(ratios)
    middle = f"median {median:.2f}" if math.isfinite(median) else "not reached on half of the seeds or more"
    within, ever = sum(ratio <= flops_share for ratio in ratios), sum(map(math.isfinite, ratios))
    return _Question(
        claim=claim,
        figure=f"{middle}; within {flops_share:g} on {within} of {total} seeds, ever on {ever} of {total}",
        p=sign_test(within, total),
        above=2 * within > total,
    )


def _answer(questions: Sequence[_Question]) -> list[Claim]:
    """Judges all claims of a table together."""
    adjusted = iter(holm([question.p for question in questions if question.p is not None]))
    claims = []
    for question in questions:
        if question.p is None:
            claims.append(Claim(claim=question.claim, holds=None, figure=question.figure))
            continue
        p = next(adjusted)
        told = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
        figure = f"{question.figure}; {told}" if question.tested else question.figure
        claims.append(Claim(claim=question.claim, holds=question.above if p <= LEVEL else None, figure=figure, p=p))
    return claims


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


def judge_claims(
    runs: Runs, metric: Metric, arm: str, sizes: Sequence[str], *, flops_share: float, margin: float
) -> tuple[list[Claim], list[Claim]]:
    """Judges headroom and a controller.

    Args:
        runs: finished runs by arm and seed.
        metric: of the score.
        arm: the controller's arm.
        sizes: arms of fixed size that are smaller than `final`.
        flops_share: share of `final`'s FLOPs within which the arm should reach its loss.
        margin: how much worse than a fixed schedule, in units of the score (a share of 1, or the metric's unit), is too
            much.

    Returns:
        The claims on headroom, `final` against `none` and each smaller size at equal FLOPs; those on the controller.
    """
    room = [_ask_difference(runs, metric, "final", other, f"final beats {other}") for other in ("none", *sizes)]
    controller = [_ask_difference(runs, metric, arm, other, f"{arm} beats {other}") for other in ("none", "random")]
    bound = metric.tell(margin, sign="")
    controller += [
        _ask_difference(runs, metric, arm, other, f"{arm} is not behind {other} by {bound}", margin=margin)
        for other in ("schedule", "immediate")
    ]
    claims = _answer([*room, *controller, _ask_cost(runs, arm, flops_share)])
    return claims[: len(room)], claims[len(room) :]
