"""Runs the cells of a comparison over tasks, and keeps them in OUT/cells.jsonl, a line each.

A line holds what decided, the task and the seed, and the curve. The command goes on where it was stopped; an arm, task
or reward that has changed since is another cell. A line that was cut off by a kill is left out and run again.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.compare.growth import GrowthCompareConfig, build_arm
from esper.leyline.errors import EsperError
from esper.leyline.plain import to_plain
from esper.run.trials.cells import Arm, Cell, Point, run_cells
from esper.simic.env.tasks import find_task


@dataclass(frozen=True, slots=True)
class Wanted:
    """One cell of a comparison.

    Fields:
        arm: its name.
        task: its name.
        seed: of the trial.
        says: what decides and what is learned; cells with the same text are the same cell.
    """

    arm: str
    task: str
    seed: int
    says: str


class CellStore:
    """The cells of one comparison.

    Args:
        config: of the comparison.
        out: its folder.
    """

    def __init__(self, config: GrowthCompareConfig, out: Path) -> None:
        self.config, self.path = config, out / "cells.jsonl"
        self._arms: dict[tuple[str, str], tuple[Arm, str]] = {}
        for name, arm in config.arms.items():
            for task in config.tasks:
                self._arms[name, task] = build_arm(arm, find_task(task))
        self.done: dict[tuple[str, int], list[Point]] = self._read()

    def wanted(self) -> list[Wanted]:
        """All cells: those of the oracle first, then seed by seed, so that a stopped comparison has whole seeds."""
        config = self.config
        measured = [name for name in config.arms if config.measured(name)]
        plan = [(measured, seed) for seed in config.oracle_seeds] + [(config.scored, seed) for seed in config.seeds]
        tasks = sorted(config.tasks, key=lambda name: -find_task(name).steps)
        cells = [(name, task, seed) for names, seed in plan for task in tasks for name in names]
        return [Wanted(name, task, seed, self._describe(name, task)) for name, task, seed in cells]

    def run(self, say: Callable[[str], None], stop: Callable[[], bool]) -> None:
        """Runs what is missing, until it is done or ``stop`` says so."""
        missing = {(one.says, one.seed): one for one in self.wanted() if (one.says, one.seed) not in self.done}
        arms = {one.says: self._arms[one.arm, one.task][0] for one in missing.values()}
        cells = {Cell(one.task, one.seed, one.says): one for one in missing.values()}
        tasks = {name: find_task(name) for name in self.config.tasks}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            finished = run_cells(list(cells), arms, tasks, places=self.config.places)
            for number, (cell, curve) in enumerate(finished, start=1):
                one = cells[cell]
                points = [
                    [p.flops, p.spent, p.loss if math.isfinite(p.loss) else None, p.size, p.births, p.prunes]
                    for p in curve
                ]
                line = {"says": one.says, "seed": one.seed, "arm": one.arm, "task": one.task, "curve": points}
                file.write(json.dumps(line) + "\n")
                file.flush()
                self.done[one.says, one.seed] = curve
                say(f"[{number}/{len(cells)}] {one.arm} in {one.task}, seed {one.seed}")
                if stop():
                    return

    def curve(self, arm: str, task: str, seed: int) -> list[Point] | None:
        """The curve of a cell; None if it has not been run."""
        return self.done.get((self._describe(arm, task), seed))

    def _describe(self, arm: str, task: str) -> str:
        plain = {**to_plain(find_task(task)), "name": ""}
        return f"{self._arms[arm, task][1]} | {json.dumps(plain, sort_keys=True)}"

    def _read(self) -> dict[tuple[str, int], list[Point]]:
        found = {}
        for entry in _lines(self.path):
            points = [Point(p[0], p[1], math.inf if p[2] is None else p[2], *p[3:]) for p in entry["curve"]]
            found[entry["says"], entry["seed"]] = points
        return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file; what a kill cut off at its end is removed from it.

    Raises:
        EsperError: a line before the last is damaged.
    """
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines):
        try:
            yield json.loads(line)
        except ValueError:
            if number < len(lines) - 1 or line.endswith("\n"):
                text = f"{path}: line {number + 1} is damaged; remove it, and its cell is run again"
                raise EsperError(text) from None
            path.write_text("".join(lines[:number]), encoding="utf-8")
            return
