"""The numbers of one arm over its seeds, and its paired differences to other arms. Pure functions of run records.

    equal FLOPs  validation loss after the same training FLOPs, the smallest total of all arms but `none`, on the seeds
                 that all of them have
    to final     training FLOPs until validation loss first reached the best of `final`, divided by the FLOPs of `final`

Score: test accuracy, minus test loss, or a metric of the task's own (minus it, where lower is better), of the
checkpoint that validation chose; higher is better.
"""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from esper.karn.runs import RunRecord
from esper.karn.stats import Estimate, bootstrap, improvements, interquartile_means, mean, paired_difference
from esper.leyline.errors import ConfigError, RunDirError
from esper.leyline.events.task import MetricInfo, TaskInfo

Runs = Mapping[str, Mapping[int, RunRecord]]  # arm -> seed -> run
BASELINES = ("none", "random", "schedule")


@dataclass(frozen=True, slots=True)
class Metric:
    """What a score is: a number about the test part, in its own unit and direction.

    Fields:
        info: its name (``accuracy``, ``loss``, or that of a metric of the task), unit and direction.
        loss_unit: unit of the task's loss.
        graded: whether there is an accuracy.
    """

    info: MetricInfo
    loss_unit: str = "nats"
    graded: bool = True
    ACCURACY: ClassVar["Metric"]
    LOSS: ClassVar["Metric"]

    def value(self, run: RunRecord) -> float:
        """The number of one run, of the checkpoint that validation chose.

        Raises:
            RunDirError: the run has none.
        """
        return self._of(run, run.test_accuracy, run.test_loss, run.test_metrics, "test")

    def final(self, run: RunRecord) -> float:
        """The same of the validation part, at the end."""
        return self._of(run, run.final_accuracy, run.final_loss, run.final_metrics, "validation")

    def score(self, run: RunRecord) -> float:
        """The score of one run; higher is better."""
        return self.value(run) if self.info.higher else -self.value(run)

    def _of(self, run: RunRecord, accuracy: float, loss: float, own: Mapping[str, float], part: str) -> float:
        if self.info.name in ("accuracy", "loss"):
            return accuracy if self.info.name == "accuracy" else loss
        if self.info.name not in own:
            raise RunDirError(f"{run.folder}: {part} {self.info.name} has no value there; this run cannot be compared")
        return own[self.info.name]

    @property
    def unit(self) -> str:
        """The unit of differences of scores; empty for a plain number."""
        return "points" if self.info.unit == "share" else self.info.unit

    @property
    def scale(self) -> float:
        """The factor that turns a score into its unit."""
        return 100.0 if self.info.unit == "share" else 1.0

    @property
    def places(self) -> int:
        """Decimals of a number in this unit."""
        return 2 if self.info.unit == "share" else 4

    @property
    def head(self) -> str:
        """Name and unit, as over a column: ``accuracy %``, ``loss``, ``mae kWh``."""
        unit = "%" if self.info.unit == "share" else "" if self.info.name == "loss" else self.info.unit
        return f"{self.info.name} {unit}".rstrip()

    def tell(self, value: float, sign: str = "+") -> str:
        """A difference of scores with its unit."""
        return f"{value * self.scale:{sign}.{self.places}f} {self.unit}".rstrip()


Metric.ACCURACY = Metric(MetricInfo(name="accuracy", unit="share"))
Metric.LOSS = Metric(MetricInfo(name="loss", unit="nats", higher=False))


def find_metric(name: str, task: TaskInfo) -> Metric:
    """The metric of a task by its name.

    Raises:
        ConfigError: the task has none of this name.
    """
    known = {"loss": MetricInfo(name="loss", unit=task.unit, higher=False)}
    if task.graded:
        known["accuracy"] = Metric.ACCURACY.info
    known |= {info.name: info for info in task.metrics}
    if name not in known:
        raise ConfigError(
            f"compare.metric = {name!r}: the task {task.name} has no such metric; it has {', '.join(known)}"
        )
    return Metric(known[name], task.unit, task.graded)


def metric_of_runs(name: str, runs: Runs) -> Metric:
    """The same of runs, all of which must learn the same.

    Raises:
        ConfigError: their tasks differ, or have no such metric.
    """
    tasks = {(run.task.name, run.task.unit): run.task for by_seed in runs.values() for run in by_seed.values()}
    if len(tasks) != 1:
        kinds = ", ".join(f"{task} in {unit}" for task, unit in sorted(tasks))
        raise ConfigError(f"compare: arms learn different tasks ({kinds}), so they have no score in common")
    return find_metric(name, *tasks.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The numbers of one arm.

    Fields:
        arm: its name.
        seeds: the seeds that it was run on.
        score: test score.
        value: the metric on the test part, in its own direction.
        final: the metric on the validation part at the end.
        iqm: interquartile mean of the test score, with a bootstrap interval.
        final_loss: validation loss at the end, per sample, in the unit of the loss.
        best_loss: lowest validation loss, likewise.
        final_accuracy: validation accuracy at the end, a share; None where the task knows no right or wrong.
        best_accuracy: highest validation accuracy, likewise.
        test_accuracy: of the checkpoint that validation chose, likewise.
        test_loss: of the same checkpoint, likewise.
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
    value: Estimate
    final: Estimate
    iqm: Estimate
    final_loss: Estimate
    best_loss: Estimate
    final_accuracy: Estimate | None
    best_accuracy: Estimate | None
    test_accuracy: Estimate | None
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


def shared_seeds(runs: Runs, *arms: str) -> list[int]:
    """The seeds that all these arms have, in order."""
    return sorted(set.intersection(*(set(runs.get(arm, {})) for arm in arms)))


def difference(runs: Runs, metric: Metric, arm: str, other: str) -> Estimate | None:
    """Paired difference of scores on the seeds that both arms have; None without any."""
    seeds = shared_seeds(runs, arm, other)
    if not seeds:
        return None
    return paired_difference([metric.score(runs[arm][s]) for s in seeds], [metric.score(runs[other][s]) for s in seeds])


def equal_flops(runs: Runs) -> dict[int, float]:
    """The smallest total of all arms but `none`, on the seeds that all have: a missing run must not move the budget."""
    arms = [arm for arm, by_seed in runs.items() if by_seed and arm != "none"]
    if not arms:
        return {}
    return {seed: min(runs[arm][seed].curve[-1].flops for arm in arms) for seed in shared_seeds(runs, *arms)}


def ratios_to_final(runs: Runs, arm: str) -> list[float]:
    """FLOPs to final's best validation loss over final's FLOPs, for each shared seed; inf if it was never reached."""
    ratios = []
    for seed in shared_seeds(runs, arm, "final"):
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
            beats[other] = bootstrap(improvements, scores, other_scores)
    return Row(
        arm=arm,
        seeds=seeds,
        score=mean(list(scores)),
        value=mean([metric.value(run) for run in records]),
        final=mean([metric.final(run) for run in records]),
        iqm=bootstrap(interquartile_means, scores),
        final_loss=mean([run.final_loss for run in records]),
        best_loss=mean([run.best_loss for run in records]),
        final_accuracy=mean([run.final_accuracy for run in records]) if metric.graded else None,
        best_accuracy=mean([run.best_accuracy for run in records]) if metric.graded else None,
        test_accuracy=mean([run.test_accuracy for run in records]) if metric.graded else None,
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
