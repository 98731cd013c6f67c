"""Twins: the same task and seed without growth, as a curve of validation loss over FLOPs.

A twin is trained by the same `Trials`, once, a fifth beyond the task's budget, since a grown host's last tick may go
beyond it. Learning rates are constant, so the twin of the largest budget is that of all tasks that differ in their
budget alone. Between its ticks the loss is interpolated; beyond its end it is the last one. At the ticks of a host that
has not grown yet the twin's loss is that host's, bit for bit.
"""

import bisect
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from esper.leyline.errors import EsperError
from esper.leyline.files import write_json
from esper.leyline.plain import digest62, to_plain
from esper.leyline.protocols import Ending, Report, Trials
from esper.simic.env.tasks import GrowthTask

FORMAT = 1
BEYOND = 1.2
LEAST_NOISE = 0.02  # nats


@dataclass(frozen=True, slots=True)
class Curve:
    """Validation loss (nats per sample) at FLOPs spent, in rising order."""

    flops: tuple[int, ...]
    losses: tuple[float, ...]

    @property
    def noise(self) -> float:
        """Standard deviation of the loss from tick to tick, nats, at least `LEAST_NOISE`: by the middle of the absolute
        differences between neighbours in the later half, as if they were normal.
        """
        later = self.losses[len(self.losses) // 2 :]
        jumps = [abs(b - a) for a, b in itertools.pairwise(later)]
        return max(statistics.median(jumps) / (0.6745 * 2**0.5), LEAST_NOISE) if jumps else LEAST_NOISE

    def __call__(self, flops: int) -> float:
        """The loss at these FLOPs, interpolated; the first or last one outside."""
        at = bisect.bisect_left(self.flops, flops)
        if at == len(self.flops):
            return self.losses[-1]
        if at == 0 or self.flops[at] == flops:
            return self.losses[at]
        before, after = self.flops[at - 1], self.flops[at]
        share = (flops - before) / (after - before)
        return self.losses[at - 1] + share * (self.losses[at] - self.losses[at - 1])


class Twins:
    """Curves by task and seed, in memory and, with a folder, on disk.

    Args:
        make_trials: makes so many hosts, which train twins and are then dropped.
        tasks: that will be asked about; of those that differ in their budget alone the largest is trained.
        most: twins that are trained together.
        folder: of the curves on disk; None keeps them in memory alone.
        key: names whatever else decides a curve, such as the code's digest.
    """

    def __init__(
        self,
        make_trials: Callable[[int], Trials[GrowthTask]],
        *,
        tasks: Iterable[GrowthTask] = (),
        most: int = 64,
        folder: Path | None = None,
        key: str = "",
    ) -> None:
        self._make_trials, self._most, self._folder, self._key = make_trials, most, folder, key
        self._curves: dict[tuple[GrowthTask, int], Curve] = {}
        self._longest: dict[GrowthTask, GrowthTask] = {}
        for task in tasks:
            self._note(task)

    def curve(self, task: GrowthTask, seed: int) -> Curve:
        """The curve of a task and seed; trains the twin if there is none yet.

        Raises:
            EsperError: the host without growth comes apart.
        """
        self.prepare([(task, seed)])
        return self._curves[self._longest[_kin(task)], seed]

    def _note(self, task: GrowthTask) -> GrowthTask:
        """The task with the largest budget among those known that differ from this one in their budget alone."""
        before = self._longest.get(_kin(task))
        if before is None or before.steps < task.steps:
            self._longest[_kin(task)] = task
        return self._longest[_kin(task)]

    def prepare(self, pairs: Iterable[tuple[GrowthTask, int]]) -> None:
        """Makes the curves of tasks and seeds, many at a time.

        Raises:
            EsperError: a host without growth comes apart.
        """
        pairs, missing = list(pairs), []
        for task, _ in pairs:
            self._note(task)
        for task, seed in dict.fromkeys([(self._note(task), seed) for task, seed in pairs]):
            if (task, seed) not in self._curves:
                curve = self._read(task, seed)
                if curve is None:
                    missing.append((task, seed))
                else:
                    self._curves[task, seed] = curve
        for first in range(0, len(missing), self._most):
            chosen = missing[first : first + self._most]
            for (task, seed), curve in zip(chosen, self._train(chosen), strict=True):
                self._curves[task, seed] = curve
                self._write(task, seed, curve)

    def _train(self, chosen: Sequence[tuple[GrowthTask, int]]) -> list[Curve]:
        trials = self._make_trials(len(chosen))
        longer = [(replace(task, steps=round(BEYOND * task.steps) + task.every), seed) for task, seed in chosen]
        reports = trials.begin_many([(place, *pair) for place, pair in enumerate(longer)])
        curves: list[list[Report]] = [[report] for report in reports]
        while any(series[-1].ending is Ending.RUNNING for series in curves):
            for series, report in zip(curves, trials.advance([[]] * len(chosen)), strict=True):
                if series[-1].ending is Ending.RUNNING:
                    series.append(report)
        return [_curve_of(curves[place], *pair) for place, pair in enumerate(chosen)]

    def _path(self, task: GrowthTask, seed: int) -> Path | None:
        if self._folder is None:
            return None
        described = {**to_plain(task), "name": ""}
        return self._folder / f"{digest62([FORMAT, described, seed, self._key]):016x}.json"

    def _read(self, task: GrowthTask, seed: int) -> Curve | None:
        path = self._path(task, seed)
        if path is None or not path.exists():
            return None
        try:
            plain: dict[str, Any] = json.loads(path.read_text())
            return Curve(tuple(plain["flops"]), tuple(plain["losses"]))
        except (OSError, ValueError, KeyError, TypeError):
            raise EsperError(f"{path}: not the curve of a twin; remove it, and it is made again") from None

    def _write(self, task: GrowthTask, seed: int, curve: Curve) -> None:
        path = self._path(task, seed)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, to_plain(curve))


def _kin(task: GrowthTask) -> GrowthTask:
    """What tasks have in common that differ in name and budget alone."""
    return replace(task, name="", steps=2 * task.every)


def _curve_of(series: Sequence[Report], task: GrowthTask, seed: int) -> Curve:
    if series[-1].ending is Ending.DIVERGED:
        raise EsperError(
            f"task {task.name}, seed {seed}: its host comes apart without any growth, so nothing can be compared with "
            "it; choose another task, or a lower learning rate"
        )
    losses = [report.validation_loss.value for report in series]
    assert None not in losses
    return Curve(tuple(report.flops for report in series), tuple(loss for loss in losses if loss is not None))
