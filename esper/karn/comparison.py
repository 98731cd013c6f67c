"""Compares arms: scores, costs and the claims that the runs support. Pure functions of run records.

Each number is a mean over seeds with its 95 % t-interval; arms on the same seeds are compared by paired differences.

    headroom     does the final topology, trained from the start, beat the host (same steps) and every fixed size
                 between them (same FLOPs) by more than two standard errors? If not, capacity does not matter here: the
                 experiment is *uninformative*, whatever the other rows say. A size that is no smaller than the grown
                 network is left out; if none is left, the question stays open
    equal FLOPs  validation loss after the same training FLOPs, the smallest total of all arms but `none`, on the seeds
                 that all of them have
    to final     training FLOPs until validation loss first reached the best of `final`, divided by the FLOPs of `final`

Score: test accuracy, or minus test loss (nats), of the checkpoint that validation chose; higher is better.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from esper.karn.runs import RunRecord
from esper.karn.stats import Estimate, bootstrap, improvement, interquartile_mean, mean, paired_difference

Runs = Mapping[str, Mapping[int, RunRecord]]  # arm -> seed -> run
BASELINES = ("none", "random", "schedule")


class Metric(StrEnum):
    """The score of a run: test accuracy, or minus test loss."""

    ACCURACY = "accuracy"
    LOSS = "loss"

    def score(self, run: RunRecord) -> float:
        """The score of one run; higher is better."""
        return run.test_accuracy if self is Metric.ACCURACY else -run.test_loss

    @property
    def unit(self) -> str:
        """The unit of differences of scores."""
        return "points" if self is Metric.ACCURACY else "nats"

    @property
    def scale(self) -> float:
        """The factor that turns a score into its unit."""
        return 100.0 if self is Metric.ACCURACY else 1.0

    @property
    def places(self) -> int:
        """Decimals of a number in this unit."""
        return 2 if self is Metric.ACCURACY else 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The numbers of one arm.

    Fields:
        arm: its name.
        seeds: the seeds that it was run on.
        score: test score.
        iqm: interquartile mean of the test score, with a bootstrap interval.
        final_loss: validation loss at the end, nats per sample.
        best_loss: lowest validation loss, nats per sample.
        final_accuracy: validation accuracy at the end, a share.
        best_accuracy: highest validation accuracy, a share.
        test_accuracy: of the checkpoint that validation chose, a share.
        test_loss: of the same checkpoint, nats per sample.
        equal_loss: validation loss at equal FLOPs; None without common seeds, or if a run is missing or ended before.
        to_final: median over seeds of FLOPs to final's loss over final's FLOPs (inf if half or more never reached it);
            None without a `final` arm.
        reached: seeds that reached final's loss.
        asked: seeds that both this arm and `final` have.
        flops: training FLOPs, mean over seeds.
        parameters: at the end, mean over seeds.
        wall_s: seconds, mean over seeds.
        against: paired differences of score to each baseline that was run.
        beats: P(arm > baseline), for each baseline that was run.
    """

    arm: str
    seeds: tuple[int, ...]
    score: Estimate
    iqm: Estimate
    final_loss: Estimate
    best_loss: Estimate
    final_accuracy: Estimate
    best_accuracy: Estimate
    test_accuracy: Estimate
    test_loss: Estimate
    equal_loss: Estimate | None
    to_final: float | None
    reached: int
    asked: int
    flops: Estimate
    parameters: Estimate
    wall_s: float
    against: dict[str, Estimate]
    beats: dict[str, Estimate]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that the table and the page show.

    Fields:
        name: of the experiment.
        metric: of its score.
        rows: one per arm, in the order given.
        equal_flops: the FLOPs of the column "equal FLOPs", for each seed that every arm but `none` has.
        informative: whether there is headroom (a single NO decides against it); None while that is open.
        verdicts: the claims, in order.
        notes: what a reader must know beside the numbers, one line each.
    """

    name: str
    metric: Metric
    rows: tuple[Row, ...]
    equal_flops: dict[int, float]
    informative: bool | None
    verdicts: tuple[Claim, ...]
    notes: tuple[str, ...] = ()

    def row(self, arm: str) -> Row | None:
        """The row of an arm; None if it was not run."""
        return next((row for row in self.rows if row.arm == arm), None)


def _shared_seeds(runs: Runs, *arms: str) -> list[int]:
    """The seeds that all these arms have, in order."""
    return sorted(set.intersection(*(set(runs.get(arm, {})) for arm in arms)))


def difference(runs: Runs, metric: Metric, arm: str, other: str) -> Estimate | None:
    """Paired difference of scores on the seeds that both arms have; None without any."""
    seeds = _shared_seeds(runs, arm, other)
    if not seeds:
        return None
    return paired_difference([metric.score(runs[arm][s]) for s in seeds], [metric.score(runs[other][s]) for s in seeds])


def equal_flops(runs: Runs) -> dict[int, float]:
    """The smallest total of all arms but `none`, on the seeds that all have: a missing run must not move the budget."""
    arms = [arm for arm, by_seed in runs.items() if by_seed and arm != "none"]
    if not arms:
        return {}
    return {seed: min(runs[arm][seed].curve[-1].flops for arm in arms) for seed in _shared_seeds(runs, *arms)}


def ratios_to_final(runs: Runs, arm: str) -> list[float]:
    """FLOPs to final's best validation loss over final's FLOPs, for each shared seed; inf if it was never reached."""
    ratios = []
    for seed in _shared_seeds(runs, arm, "final"):
        final = runs["final"][seed]
        spent = runs[arm][seed].flops_to(final.best_loss)
        ratios.append(math.inf if spent is None else spent / final.flops)
    return ratios


def make_row(runs: Runs, metric: Metric, arm: str) -> Row:
    """Computes the row of an arm that has at least one run."""
    by_seed = runs[arm]
    seeds = tuple(sorted(by_seed))
    records = [by_seed[seed] for seed in seeds]
    scores = np.array([metric.score(run) for run in records])
    at_equal = equal_flops(runs)
    equal = [by_seed[seed].loss_at(flops) if seed in by_seed else None for seed, flops in at_equal.items()]
    measured = [loss for loss in equal if loss is not None]
    ratios = ratios_to_final(runs, arm)
    others = [other for other in BASELINES if other != arm and other in runs]
    against, beats = {}, {}
    for other in others:
        margin = difference(runs, metric, arm, other)
        if margin is not None:
            against[other] = margin
            other_scores = np.array([metric.score(run) for run in runs[other].values()])
            beats[other] = bootstrap(improvement, scores, other_scores)
    return Row(
        arm=arm,
        seeds=seeds,
        score=mean(list(scores)),
        iqm=bootstrap(interquartile_mean, scores),
        final_loss=mean([run.final_loss for run in records]),
        best_loss=mean([run.best_loss for run in records]),
        final_accuracy=mean([run.final_accuracy for run in records]),
        best_accuracy=mean([run.best_accuracy for run in records]),
        test_accuracy=mean([run.test_accuracy for run in records]),
        test_loss=mean([run.test_loss for run in records]),
        equal_loss=mean(measured) if measured and len(measured) == len(equal) else None,
        to_final=statistics.median(ratios) if ratios else None,
        reached=sum(map(math.isfinite, ratios)),
        asked=len(ratios),
        flops=mean([run.flops for run in records]),
        parameters=mean([run.parameters for run in records]),
        wall_s=statistics.fmean(run.wall_s for run in records),
        against=against,
        beats=beats,
    )


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
        seeds = _shared_seeds(runs, size, "final")
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


def compare(
    name: str,
    runs: Runs,
    metric: Metric,
    *,
    sizes: Sequence[str],
    subject: str,
    flops_share: float,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compares all arms.

    Args:
        name: of the experiment.
        runs: finished runs by arm and seed; arms without a run are left out.
        metric: of the score.
        sizes: arms of fixed size between host and final.
        subject: the arm that the claims are about.
        flops_share: the share of `final`'s training FLOPs within which the subject should reach its loss.
        notes: the caller's notes, one line each, shown before those made here.
    """
    present = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    smaller, own_notes = choose_smaller_sizes(present, sizes)
    room = judge_headroom(present, metric, smaller)
    holds = [verdict.holds for verdict in room]
    undecided = not smaller or None in holds
    at_equal, every = equal_flops(present), set[int]().union(*present.values())
    if len(at_equal) < len(every):
        own_notes.append(
            f"loss at equal FLOPs is over {len(at_equal)} of {len(every)} seeds: those of every arm but none"
        )
    return Comparison(
        name=name,
        metric=metric,
        rows=tuple(make_row(present, metric, arm) for arm in present),
        equal_flops=at_equal,
        informative=False if False in holds else None if undecided else True,
        verdicts=(*room, *make_claims(present, metric, subject, flops_share=flops_share)),
        notes=(*notes, *own_notes),
    )
