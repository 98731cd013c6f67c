"""Arms side by side: what each reached, at which cost, and what may be said of it. Pure functions of run records.

A number stands over seeds with its 95 % t-interval; arms on the same seeds are compared by paired differences.

    headroom     does the final topology, trained from the start, beat the host (same steps) and every fixed size
                 between them (same FLOPs) by more than two standard errors? If not, capacity does not matter here: the
                 experiment is *uninformative*, whatever the other rows say
    equal FLOPs  validation loss when the account stood at the smallest total of all arms but `none`
    to final     training FLOPs until validation loss first came down to the best of `final`, over what `final` spent

Score: test accuracy, or minus test loss (nats), of the checkpoint that validation chose; higher is better.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from esper.karn.runs import RunRecord
from esper.karn.stats import Estimate, bootstrap, improvement, interquartile_mean, mean, paired

Runs = Mapping[str, Mapping[int, RunRecord]]  # arm -> seed -> run
BASELINES = ("none", "random", "schedule")


class Metric(StrEnum):
    """What a score is: test accuracy, or minus test loss."""

    ACCURACY = "accuracy"
    LOSS = "loss"

    def score(self, run: RunRecord) -> float:
        """Of one run; higher is better."""
        return run.test_accuracy if self is Metric.ACCURACY else -run.test_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One arm.

    Fields:
        arm, seeds: whose numbers these are.
        score, iqm: test score; its interquartile mean with a bootstrap interval.
        final_loss, best_loss: validation, nats per sample. test_accuracy, test_loss: of the chosen checkpoint.
        equal_loss: validation loss at equal FLOPs; None where some seed ended below it.
        to_final: median over seeds of FLOPs to final's loss over final's FLOPs (inf: most never got there); None
            without a `final` arm. reached: seeds that got there.
        flops, parameters, wall_s: means over seeds.
        against: paired differences of score to each baseline that was run. beats: P(arm > baseline).
    """

    arm: str
    seeds: tuple[int, ...]
    score: Estimate
    iqm: Estimate
    final_loss: Estimate
    best_loss: Estimate
    test_accuracy: Estimate
    test_loss: Estimate
    equal_loss: Estimate | None
    to_final: float | None
    reached: int
    flops: float
    parameters: float
    wall_s: float
    against: dict[str, Estimate]
    beats: dict[str, Estimate]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One claim, with the figure that decides it. ``holds`` is None where a run is missing."""

    claim: str
    holds: bool | None
    figure: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that the table and the page show.

    Fields:
        name, metric: of the experiment. rows: one per arm, in the order given. equal_flops: per seed.
        informative: there is headroom; None while an arm that decides it is missing. verdicts: claims, in order.
    """

    name: str
    metric: Metric
    rows: tuple[Row, ...]
    equal_flops: dict[int, float]
    informative: bool | None
    verdicts: tuple[Verdict, ...]

    def row(self, arm: str) -> Row | None:
        """The row of an arm, None if it was not run."""
        return next((row for row in self.rows if row.arm == arm), None)


def _shared(runs: Runs, *arms: str) -> list[int]:
    return sorted(set.intersection(*(set(runs.get(arm, {})) for arm in arms)))


def difference(runs: Runs, metric: Metric, arm: str, other: str) -> Estimate | None:
    """Paired difference of scores on the seeds that both arms have; None without any."""
    seeds = _shared(runs, arm, other)
    if not seeds:
        return None
    return paired([metric.score(runs[arm][s]) for s in seeds], [metric.score(runs[other][s]) for s in seeds])


def equal_flops(runs: Runs) -> dict[int, float]:
    """Per seed, the smallest total of all arms but `none`."""
    totals: dict[int, list[float]] = {}
    for arm, by_seed in runs.items():
        for seed, run in by_seed.items():
            if arm != "none":
                totals.setdefault(seed, []).append(run.curve[-1].flops)
    return {seed: min(values) for seed, values in totals.items()}


def _to_final(runs: Runs, arm: str) -> tuple[float | None, int]:
    seeds = _shared(runs, arm, "final")
    if not seeds:
        return None, 0
    ratios = []
    for seed in seeds:
        final = runs["final"][seed]
        spent = runs[arm][seed].flops_to(final.best_loss)
        ratios.append(math.inf if spent is None else spent / final.flops)
    return statistics.median(ratios), sum(math.isfinite(ratio) for ratio in ratios)


def make_row(runs: Runs, metric: Metric, arm: str) -> Row:
    """The row of an arm that has at least one run."""
    by_seed = runs[arm]
    seeds = tuple(sorted(by_seed))
    own = [by_seed[seed] for seed in seeds]
    scores = np.array([metric.score(run) for run in own])
    at_equal = equal_flops(runs)
    equal = [by_seed[seed].loss_at(at_equal[seed]) if seed in at_equal else None for seed in seeds]
    measured = [loss for loss in equal if loss is not None]
    to_final, reached = _to_final(runs, arm)
    others = [other for other in BASELINES if other != arm and other in runs]
    against, beats = {}, {}
    for other in others:
        found = difference(runs, metric, arm, other)
        if found is not None:
            against[other] = found
            theirs = np.array([metric.score(run) for run in runs[other].values()])
            beats[other] = bootstrap(improvement, scores, theirs)
    return Row(
        arm=arm, seeds=seeds, score=mean(list(scores)), iqm=bootstrap(interquartile_mean, scores),
        final_loss=mean([run.final_loss for run in own]), best_loss=mean([run.best_loss for run in own]),
        test_accuracy=mean([run.test_accuracy for run in own]), test_loss=mean([run.test_loss for run in own]),
        equal_loss=mean(measured) if len(measured) == len(seeds) else None, to_final=to_final, reached=reached,
        flops=statistics.fmean(run.flops for run in own), parameters=statistics.fmean(run.parameters for run in own),
        wall_s=statistics.fmean(run.wall_s for run in own), against=against, beats=beats,
    )  # fmt: skip


def _above(found: Estimate | None, claim: str, standard_errors: float) -> Verdict:
    """Whether a difference exceeds so many standard errors (a negative number allows a loss of as many)."""
    if found is None or found.se is None:
        return Verdict(claim=claim, holds=None, figure="needs runs of both on two seeds or more")
    if found.se > 1e-9 * abs(found.value):
        in_se = found.value / found.se
    else:  # every seed differs by the same, up to rounding
        in_se = math.copysign(math.inf, found.value) if found.value else 0.0
    figure = f"{found.value:+.4f} ± {found.se:.4f} over {found.n} seeds ({in_se:+.1f} SE)"
    return Verdict(claim=claim, holds=in_se > standard_errors, figure=figure)


def headroom(runs: Runs, metric: Metric, sizes: Sequence[str]) -> list[Verdict]:
    """Whether capacity matters: `final` against `none`, and against each fixed size at its FLOPs."""
    return [
        _above(difference(runs, metric, "final", other), f"final beats {other} by more than 2 SE", 2.0)
        for other in ("none", *sizes)
    ]


def claims(runs: Runs, metric: Metric, arm: str, *, flops_share: float) -> list[Verdict]:
    """What a controller has to show: better than nothing and chance, no worse than dumb schedules, and cheaper."""
    found = [
        _above(difference(runs, metric, arm, other), f"{arm} beats {other} by more than 2 SE", 2.0)
        for other in ("none", "random")
    ]
    found += [
        _above(difference(runs, metric, arm, other), f"{arm} is not below {other} by more than 1 SE", -1.0)
        for other in ("schedule", "immediate")
    ]
    ratio, reached = _to_final(runs, arm)
    claim = f"{arm} reaches final's loss with at most {flops_share:g} of its FLOPs"
    if ratio is None:
        found.append(Verdict(claim=claim, holds=None, figure="needs runs of both"))
    else:
        share = "never on most seeds" if math.isinf(ratio) else f"median {ratio:.2f}"
        total = len(_shared(runs, arm, "final"))
        found.append(
            Verdict(claim=claim, holds=ratio <= flops_share, figure=f"{share}; reached on {reached} of {total}")
        )
    return found


def compare(
    name: str, runs: Runs, metric: Metric, *, sizes: Sequence[str], subject: str, flops_share: float
) -> Comparison:
    """Puts all arms beside each other.

    Args:
        runs: finished runs by arm and seed; arms without a run are left out.
        sizes: arms of fixed size between host and final. subject: the arm that the claims are about.
        flops_share: of `final`'s training FLOPs, within which the subject is to reach its loss.
    """
    present = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    room = headroom(present, metric, sizes)
    undecided = any(verdict.holds is None for verdict in room)
    return Comparison(
        name=name, metric=metric, rows=tuple(make_row(present, metric, arm) for arm in present),
        equal_flops=equal_flops(present),
        informative=None if undecided else all(verdict.holds for verdict in room),
        verdicts=(*room, *claims(present, metric, subject, flops_share=flops_share)),
    )  # fmt: skip
