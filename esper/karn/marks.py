"""Arms read at many FLOP marks: what each has come to, where rivals pass it, how far it is from the best size.

A mark is a share of what another arm has cost, such as the trained host that all others begin with. At a mark a run is
worth its validation loss there, linear between the ticks before and after: where the rate is constant and the weights
are averaged, every moment is nearly as good as an end (Hagele et al. 2024, "Scaling laws and compute-optimal training
beyond fixed training durations"). Nothing is chosen by that loss, so it is a reading of held-out samples.

    regret      mean over marks of (loss - least loss of the arms of a fixed size), seed by seed
    crossing    the mark from which on the same one of an arm and the subject has the lower mean loss

Pure functions of run records. Lower is better throughout.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from esper.karn.rows import Runs
from esper.karn.runs import RunRecord
from esper.karn.stats import Estimate, bootstrap, improvements, interquartile_means, mean, paired_difference

SLACK = 0.02  # share of a mark that a run may lack
GRID = 60  # points of a crossing's search


@dataclass(kw_only=True, slots=True)
class MarkClaim:
    """What a comparison is to show: one arm below another at the main mark, by more than two standard errors."""

    arm: str
    """The arm that is to be lower."""

    than: str
    """The arm that it is compared with, seed by seed."""

    metric: str = "loss"
    """``loss``, or a metric of the task such as loss_new."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkRow:
    """One arm at one mark.

    Fields:
        arm: its name.
        mark: share of the yardstick's FLOPs.
        seeds: seeds that reach the mark.
        loss: mean over them.
        middle: interquartile mean, with a bootstrap interval.
        apart: further metrics by name, mean over seeds.
        behind: loss minus the subject's, paired; None for the subject, or without a common seed.
        subject_better: P(the subject has less loss), of two seeds drawn at random; None likewise.
    """

    arm: str
    mark: float
    seeds: tuple[int, ...]
    loss: Estimate
    middle: Estimate
    apart: dict[str, Estimate]
    behind: Estimate | None
    subject_better: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkVerdict:
    """A claim, and what the runs say of it: the difference arm minus other over paired seeds; None without any."""

    claim: MarkClaim
    difference: Estimate | None

    @property
    def errors(self) -> float | None:
        """By how many standard errors the arm is lower; None from fewer than two seeds."""
        found = self.difference
        return None if found is None or not found.se else -found.value / found.se


@dataclass(frozen=True, slots=True)
class Crossing:
    """The mark from which on ``lower``, an arm or the subject, has the lower mean loss."""

    mark: float
    lower: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkReport:
    """Everything that is said at marks.

    Fields:
        rows: arm by arm within each mark.
        verdicts: of the claims.
        regret: of each arm that reaches all marks, over seeds.
        crossings: of each other arm with the subject; None where no mark has both.
        sunk: mean FLOPs of the yardstick.
        cost: mean FLOPs of each arm's runs.
    """

    rows: tuple[MarkRow, ...]
    verdicts: dict[str, MarkVerdict]
    regret: dict[str, Estimate]
    crossings: dict[str, Crossing | None]
    sunk: float
    cost: dict[str, float]


def reading_at(run: RunRecord, flops: float, metric: str = "loss") -> float | None:
    """A metric of validation after so many training FLOPs, linear between ticks; None outside the curve.

    A run that ends just before a mark is read at its end: lengths are whole steps.

    Raises:
        KeyError: the run has no such metric.
    """
    curve = run.curve
    if not curve[0].flops <= flops <= curve[-1].flops * (1 + SLACK):
        return None
    values = [point.loss if metric == "loss" else point.metrics[metric] for point in curve]
    return float(np.interp(flops, [point.flops for point in curve], values))


class Marks:
    """Runs, read at shares of what the runs of a yardstick have cost, seed by seed.

    Args:
        runs: finished runs by arm and seed.
        of: the arm whose FLOPs are 1.
    """

    def __init__(self, runs: Runs, of: str) -> None:
        self.runs, self.unit = runs, {seed: run.flops for seed, run in runs.get(of, {}).items()}

    def at(self, arm: str, mark: float, metric: str = "loss") -> dict[int, float]:
        """The readings of an arm at a mark, by seed; those of runs that end before it are left out."""
        found = {}
        for seed, run in sorted(self.runs.get(arm, {}).items()):
            value = None if seed not in self.unit else reading_at(run, mark * self.unit[seed], metric)
            if value is not None:
                found[seed] = value
        return found

    def difference(self, arm: str, than: str, mark: float, metric: str = "loss") -> Estimate | None:
        """Arm minus other over the seeds of both."""
        one, two = self.at(arm, mark, metric), self.at(than, mark, metric)
        seeds = sorted(one.keys() & two.keys())
        return paired_difference([one[s] for s in seeds], [two[s] for s in seeds]) if seeds else None

    def row(self, arm: str, mark: float, subject: str, apart: Sequence[str]) -> MarkRow | None:
        """One arm at one mark; None if no seed reaches it."""
        losses = self.at(arm, mark)
        if not losses:
            return None
        own = np.array(list(losses.values()))
        other = np.array(list(self.at(subject, mark).values()))
        compared = arm != subject and len(other) > 0
        return MarkRow(
            arm=arm,
            mark=mark,
            seeds=tuple(losses),
            loss=mean(list(own)),
            middle=bootstrap(interquartile_means, own),
            apart={name: mean(list(self.at(arm, mark, name).values())) for name in apart},
            behind=self.difference(arm, subject, mark) if compared else None,
            subject_better=bootstrap(improvements, -other, -own) if compared else None,
        )

    def regret(self, arm: str, marks: Sequence[float], sizes: Sequence[str]) -> Estimate | None:
        """Mean over marks of the loss above the least of the fixed sizes, over the seeds that reach all marks.

        None where there is no mark, no fixed size or no such seed.
        """
        if not marks or not sizes:
            return None
        own = [self.at(arm, mark) for mark in marks]
        envelope = [self._least(mark, sizes) for mark in marks]
        seeds = set.intersection(*(set(at) for at in own), *(set(at) for at in envelope))
        if not seeds:
            return None
        return mean([float(np.mean([o[s] - e[s] for o, e in zip(own, envelope, strict=True)])) for s in sorted(seeds)])

    def _least(self, mark: float, sizes: Sequence[str]) -> dict[int, float]:
        every = [self.at(size, mark) for size in sizes]
        seeds = set.intersection(*(set(at) for at in every))
        return {seed: min(at[seed] for at in every) for seed in seeds}

    def crossing(self, arm: str, subject: str, last: float) -> Crossing | None:
        """Where the two cross for the last time, up to a mark; the first common mark if they never do."""
        found: Crossing | None = None
        for mark in np.linspace(last / GRID, last, GRID):
            between = self.difference(arm, subject, float(mark))
            if between is not None:
                lower = arm if between.value < 0 else subject
                found = found if found is not None and found.lower == lower else Crossing(float(mark), lower)
        return found


def report_marks(
    runs: Runs,
    *,
    of: str,
    at: Sequence[float],
    main: float,
    subject: str,
    sizes: Sequence[str],
    apart: Sequence[str],
    claims: Mapping[str, MarkClaim],
) -> MarkReport:
    """Reads all arms at all marks.

    Args:
        runs: finished runs by arm and seed.
        of: the arm whose FLOPs are 1; it has no row.
        at: the marks.
        main: the mark of the claims.
        subject: the arm that others are compared with.
        sizes: arms of a fixed size, whose least loss is what regret is counted from.
        apart: metrics that are shown beside the loss.
        claims: by name.
    """
    marks, arms = Marks(runs, of), [arm for arm, by_seed in runs.items() if by_seed and arm != of]
    rows = [marks.row(arm, mark, subject, apart) for mark in at for arm in arms]
    early = [mark for mark in at if mark <= 1]
    regrets = {arm: marks.regret(arm, early, sizes) for arm in arms}
    return MarkReport(
        rows=tuple(row for row in rows if row is not None),
        verdicts={
            name: MarkVerdict(claim=claim, difference=marks.difference(claim.arm, claim.than, main, claim.metric))
            for name, claim in claims.items()
        },
        regret={arm: found for arm, found in regrets.items() if found is not None},
        crossings={arm: marks.crossing(arm, subject, max(at)) for arm in arms if arm != subject},
        sunk=float(np.mean(list(marks.unit.values()))) if marks.unit else math.nan,
        cost={arm: float(np.mean([run.flops for run in runs[arm].values()])) for arm in arms},
    )
