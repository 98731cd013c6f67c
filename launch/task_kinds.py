"""Measures in which tasks of a growth policy growing pays, and when; type the command again and it goes on.

    python launch/task_kinds.py --out kinds.jsonl                           # all tasks, three seeds
    python launch/task_kinds.py --out kinds.jsonl --tasks d1,r1 --seeds 0   # some
    python launch/task_kinds.py --out kinds.jsonl --table                   # the table alone, of what is there

Hosts of one shape are stepped together. The learning rate is constant, so a run of the largest budget holds those of
all smaller ones, and tasks that differ in their budget alone share their runs. Arms of one seed share first weights,
data and its order, and are compared at equal FLOPs by the record's account:

    none       the bare host
    now        with a seed that is born at the first tick; one run for each blueprint that is tried
    planted    with a seed from the first step: of the blueprint that was the best `now`, as of the arm below
    late       with a seed that is born when a third of the largest budget of these tasks is spent

The lead of an arm is what it saves against `none`: validation loss, minus ``lambda`` times the logarithm of the
parameters relative to the bare host, as in the reward. Its error is that of the paired differences over seeds. Growing
pays in a task if the arm and blueprint with the best lead lead by more than two errors, and by more than ``least``.
A task is then of the kind *at once* if a seed of that blueprint, born at the first tick, leads already when two fifths
of the budget are spent, and *late* if it does not yet: evidence speaks against it before it pays. Else: *never*.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from esper.compare.kinds import EARLY, LEAST, TICKS, name_kind
from esper.run.trials.cells import Arm, Cell, run_cells
from esper.run.trials.planned import Planned
from esper.simic.env.tasks import REGISTERED, Family, GrowthTask, Purpose, find_task

ARMS = ("none", "now", "planted", "late")
OPTIONS_OF: dict[Family, tuple[tuple[str, str], ...]] = {
    Family.DIGITS: (("r1c0", "conv_small"), ("r1c0", "norm"), ("r0c1", "conv_small")),
    Family.BYTES: (("r0c0", "mlp"), ("r0c0", "attention"), ("r0c0", "norm")),
    Family.RECALL: (("r0c0", "mlp"), ("r0c0", "attention"), ("r0c0", "norm")),
}
LATE = 1 / 3  # share of the largest budget after which a late seed is born
Curve = list[list[float]]  # budget in steps of the bare host, validation loss, parameters relative to the bare host


@dataclass(frozen=True, slots=True)
class Run:
    """One run: tasks that differ in their budget alone have the same ``group``."""

    group: str
    arm: str
    seed: int
    slot: str = ""
    blueprint: str = ""


def group_of(task: GrowthTask) -> str:
    """What tasks have in common that share their runs."""
    return f"{task.family.value}-{task.width}x{task.depth}-{task.samples}-{task.noise:g}"


def longest(tasks: Sequence[GrowthTask]) -> dict[str, GrowthTask]:
    """The task with the largest budget of each group."""
    found: dict[str, GrowthTask] = {}
    for task in tasks:
        key = group_of(task)
        if key not in found or found[key].steps < task.steps:
            found[key] = task
    return found


def runs_of(tasks: Sequence[GrowthTask], seeds: Sequence[int], arms: Sequence[str], path: Path) -> list[Run]:
    """The runs of some arms, longest first; which blueprint is planted and late depends on what has been measured."""
    runs = []
    for seed in seeds:
        for key, task in sorted(longest(tasks).items(), key=lambda item: -item[1].steps):
            for arm in arms:
                if arm == "none":
                    runs.append(Run(key, arm, seed))
                elif arm == "now":
                    runs += [Run(key, arm, seed, *option) for option in OPTIONS_OF[task.family]]
                else:
                    best = best_of(read_runs(path), task, 1.0, 0.0, ("now",))
                    runs += [] if best is None else [Run(key, arm, seed, *best[1][1:])]
    return runs


def arm_of(run: Run) -> Arm:
    """What decides in a run."""
    seeds = {run.slot: run.blueprint}
    if run.arm == "planted":
        return Arm(planted=seeds)
    after = LATE if run.arm == "late" else 0.0
    return Arm() if run.arm == "none" else Arm(controller=lambda slots, seed: Planned(seeds, after))


def measure(runs: Sequence[Run], tasks: Sequence[GrowthTask], path: Path) -> None:
    """Trains hosts to the end of the largest budget of their tasks, many at a time; writes each curve as it ends."""
    groups, cells = longest(tasks), {}
    for run in runs:
        cells[Cell(run.group, run.seed, f"{run.arm}/{run.slot}/{run.blueprint}")] = run
    arms = {cell.arm: arm_of(run) for cell, run in cells.items()}
    for cell, points in run_cells(list(cells), arms, groups):
        steps = groups[cell.task].steps
        each = [[steps * point.spent, point.loss, point.size] for point in points]
        with path.open("a") as file:
            run = {name: getattr(cells[cell], name) for name in Run.__slots__}
            file.write(json.dumps({"run": run, "curve": each}) + "\n")


def read_at(curve: Curve, steps: float) -> tuple[float, float]:
    """Loss at a budget, the mean of that tick and those before it, each interpolated, and the relative size."""
    every = (curve[-1][0] - curve[0][0]) / max(1, len(curve) - 1)
    reads = [_read_at(curve, steps - back * every) for back in range(TICKS)]
    return statistics.fmean(loss for loss, _ in reads), reads[0][1]


def _read_at(curve: Curve, steps: float) -> tuple[float, float]:
    before = curve[0]
    for point in curve:
        if point[0] >= steps:
            across = point[0] - before[0]
            share = (steps - before[0]) / across if across else 0.0
            return before[1] + (point[1] - before[1]) * share, point[2]
        before = point
    return curve[-1][1], curve[-1][2]


Choice = tuple[str, str, str]  # arm, slot, blueprint
Lead = tuple[float, float]  # mean and standard error


def lead_of(curves: Mapping[Run, Curve], task: GrowthTask, choice: Choice, share: float, price: float) -> Lead | None:
    """Mean lead over `none` at a share of the budget, and its standard error; None if it has not been measured."""
    differences = []
    for run, curve in curves.items():
        if (run.group, run.arm, run.slot, run.blueprint) == (group_of(task), *choice):
            bare = curves.get(Run(run.group, "none", run.seed))
            if bare is not None:
                loss, size = read_at(curve, share * task.steps)
                differences.append(read_at(bare, share * task.steps)[0] - loss - price * math.log(size))
    if not differences:
        return None
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.inf
    return statistics.fmean(differences), error


def best_of(
    curves: Mapping[Run, Curve], task: GrowthTask, share: float, price: float, arms: Sequence[str] = ARMS[1:]
) -> tuple[Lead, Choice] | None:
    """The best lead of some arms at a share of the budget, and whose it is; None if there is none."""
    choices = [(arm, *option) for arm in arms for option in OPTIONS_OF[task.family]]
    known = [(lead, choice) for choice in choices if (lead := lead_of(curves, task, choice, share, price)) is not None]
    return max(known) if known else None


def kind_of(curves: Mapping[Run, Curve], task: GrowthTask, price: float, least: float) -> tuple[str, Lead | None]:
    """The kind of a task, "?" where one seed alone has been measured, and the early lead that it follows from."""
    best = best_of(curves, task, 1.0, price)
    if best is None:
        return "?", None
    (lead, error), (_, slot, blueprint) = best
    early = lead_of(curves, task, ("now", slot, blueprint), EARLY, price)
    return name_kind(lead, error, None if early is None else early[0], least), early


def show(lead: Lead | None) -> str:
    """A lead with its error, as far as they are known."""
    if lead is None:
        return ""
    return f"{lead[0]:+.3f}" + (f" ± {lead[1]:.3f}" if math.isfinite(lead[1]) else "")


def table(curves: Mapping[Run, Curve], price: float, least: float) -> None:
    """Prints the kinds of all tasks of which something has been measured."""
    print("| task | family | host | samples | noise | budget | none | now | planted | late | best | early | kind |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for tasks in REGISTERED.values():
        for task in tasks:
            bare = [curve for run, curve in curves.items() if (run.group, run.arm) == (group_of(task), "none")]
            best = best_of(curves, task, 1.0, price)
            if not bare or best is None:
                continue
            loss = statistics.fmean(read_at(curve, task.steps)[0] for curve in bare)
            kind, early = kind_of(curves, task, price, least)
            arms = [best_of(curves, task, 1.0, price, (arm,)) for arm in ARMS[1:]]
            cells = [show(None if one is None else one[0]) for one in arms]
            print(
                f"| {task.name} | {task.family.value} | {task.width}x{task.depth} | {task.samples} | {task.noise:g} | "
                f"{task.steps} | {loss:.3f} | {' | '.join(cells)} | {' '.join(best[1])} | {show(early)} | {kind} |"
            )


def read_runs(path: Path) -> dict[Run, Curve]:
    """What has been measured."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {Run(**entry["run"]): entry["curve"] for entry in map(json.loads, lines)}


def main() -> int:
    """Measures what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a line a run; what stands there is kept")
    parser.add_argument("--tasks", default=",".join(t.name for p in Purpose for t in REGISTERED[p]), help="names")
    parser.add_argument("--seeds", default="0,1,2", help="of the trials")
    parser.add_argument("--price", type=float, default=0.02, help="lambda of the objective, nats")
    parser.add_argument("--least", type=float, default=LEAST, help="lead below which growing does not pay, nats")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tasks, seeds = [find_task(name) for name in given.tasks.split(",")], list(map(int, given.seeds.split(",")))
    for arms in [] if given.table else [("none", "now"), ("planted", "late")]:
        runs = runs_of(tasks, seeds, arms, given.out)
        measure([run for run in runs if run not in read_runs(given.out)], tasks, given.out)
    table(read_runs(given.out), given.price, given.least)
    return 0


if __name__ == "__main__":
    sys.exit(main())
