"""Measures in which tasks of a growth policy growing pays, and when; type the command again and it goes on.

    python launch/task_kinds.py --out kinds.jsonl                           # all tasks, two seeds
    python launch/task_kinds.py --out kinds.jsonl --tasks d1,r1 --seeds 0   # some
    python launch/task_kinds.py --out kinds.jsonl --part 1/2                # every other run; part 2/2 beside it
    python launch/task_kinds.py --out kinds.jsonl --table                   # the table alone, of what is there

The learning rate is constant, so a run of the largest budget holds those of all smaller ones. Tasks that differ in
their budget alone share their runs. Arms of one seed share first weights, data and its order, and are compared at equal
FLOPs by the record's account:

    none       the bare host
    planted    the network with a seed in it from the first step
    now        the same seed, born at the first tick
    late       the same seed, born when a third of the largest budget of these tasks is spent

The lead of an arm is what it saves against `none`: validation loss, minus ``lambda`` times the logarithm of the
parameters relative to the bare host, as in the reward. Leads are means over seeds and blueprints' best; their error is
that of the paired differences. A task is of the kind

    never      no arm leads by more than two errors and by more than ``least``
    at once    some arm does, and `now` leads already when two fifths of the budget are spent
    late       some arm does, and `now` does not lead yet by then
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from esper.leyline.commands import Command
from esper.leyline.protocols import Ending, Report
from esper.leyline.stages import Op, Stage
from esper.run.trials.config import trial_config
from esper.run.trials.parts import TrialMaker
from esper.run.trials.plain import PlainTrials
from esper.simic.env.tasks import REGISTERED, Family, GrowthTask, Purpose, find_task

ARMS = ("none", "now", "planted", "late")
SEEDS_OF: dict[Family, tuple[tuple[str, str], ...]] = {
    Family.DIGITS: (("r1c0", "conv_small"), ("r0c0", "conv_light")),
    Family.BYTES: (("r0c0", "attention"), ("r0c0", "mlp")),
    Family.RECALL: (("r0c0", "attention"),),
}
EARLY = 0.4  # share of the budget at which a lead counts as early
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


def runs_of(tasks: Sequence[GrowthTask], seeds: Sequence[int]) -> Iterator[tuple[Run, GrowthTask]]:
    """All runs, the telling ones first."""
    for seed in seeds:
        for arm in ARMS:
            for key, task in longest(tasks).items():
                for slot, blueprint in SEEDS_OF[task.family] if arm != "none" else (("", ""),):
                    yield Run(key, arm, seed, slot, blueprint), task


def command_of(run: Run, report: Report) -> list[Command]:
    """What an arm says at a tick."""
    if run.arm not in ("now", "late"):
        return []
    view = report.observation.slot(run.slot)
    if view.stage is Stage.EMPTY and not view.staged and not view.generation:
        due = run.arm == "now" or report.flops >= report.budget / 3
        return [Command(slot=run.slot, op=Op.GERMINATE, blueprint=run.blueprint, ticks=1)] if due else []
    return [Command(slot=run.slot, op=Op.ADVANCE)] if view.stage in (Stage.GERMINATED, Stage.TRAINING) else []


def measure(run: Run, task: GrowthTask) -> Curve:
    """Trains one host to the end of the task's budget."""
    planted = {"slots.planted": {run.slot: run.blueprint}} if run.arm == "planted" else {}
    trials = PlainTrials(1, maker=TrialMaker(lambda task, seed: trial_config(task, seed, planted)))
    report = trials.begin(0, task, run.seed)
    curve = []
    while True:
        loss, bare = report.validation_loss.value, report.observation.host.parameters
        spent = report.flops / report.budget * task.steps
        curve.append([spent, math.inf if loss is None else loss, report.parameters / bare])
        if report.ending is not Ending.RUNNING:
            return curve
        (report,) = trials.advance([command_of(run, report)])


def read_at(curve: Curve, steps: float) -> tuple[float, float]:
    """Loss, interpolated, and relative size at a budget."""
    before = curve[0]
    for point in curve:
        if point[0] >= steps:
            across = point[0] - before[0]
            share = (steps - before[0]) / across if across else 0.0
            return before[1] + (point[1] - before[1]) * share, point[2]
        before = point
    return curve[-1][1], curve[-1][2]


def leads(curves: Mapping[Run, Curve], task: GrowthTask, arm: str, share: float, price: float) -> tuple[float, float]:
    """Mean lead of an arm's best blueprint over `none` at a share of the budget, and its standard error."""
    key, best = group_of(task), (-math.inf, math.inf)
    for slot, blueprint in SEEDS_OF[task.family]:
        differences = []
        for run, curve in curves.items():
            if (run.group, run.arm, run.slot, run.blueprint) == (key, arm, slot, blueprint):
                bare = curves.get(Run(key, "none", run.seed))
                if bare is not None:
                    loss, size = read_at(curve, share * task.steps)
                    differences.append(read_at(bare, share * task.steps)[0] - loss - price * math.log(size))
        if differences:
            error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else math.inf
            best = max(best, (statistics.fmean(differences), error))
    return best


def kind_of(curves: Mapping[Run, Curve], task: GrowthTask, price: float, least: float) -> str:
    """The kind of a task; "?" where one seed alone has been measured."""
    ends = [leads(curves, task, arm, 1.0, price) for arm in ARMS[1:]]
    if not any(math.isfinite(error) for _, error in ends):
        return "?"
    if not any(lead > max(2 * error, least) for lead, error in ends):
        return "never"
    return "at once" if leads(curves, task, "now", EARLY, price)[0] > 0 else "late"


def show(lead: tuple[float, float]) -> str:
    """A lead with its error, as far as they are known."""
    if not math.isfinite(lead[0]):
        return ""
    return f"{lead[0]:+.3f}" + (f" ± {lead[1]:.3f}" if math.isfinite(lead[1]) else "")


def table(curves: Mapping[Run, Curve], price: float, least: float) -> None:
    """Prints the kinds of all tasks of which something has been measured."""
    print("| task | family | host | samples | noise | budget | none | now, early | now | planted | late | kind |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for tasks in REGISTERED.values():
        for task in tasks:
            bare = [curve for run, curve in curves.items() if (run.group, run.arm) == (group_of(task), "none")]
            if bare:
                loss = statistics.fmean(read_at(curve, task.steps)[0] for curve in bare)
                cells = [leads(curves, task, "now", EARLY, price)]
                cells += [leads(curves, task, arm, 1.0, price) for arm in ARMS[1:]]
                host, kind = f"{task.width}x{task.depth}", kind_of(curves, task, price, least)
                print(
                    f"| {task.name} | {task.family.value} | {host} | {task.samples} | {task.noise:g} | {task.steps} | "
                    f"{loss:.3f} | {' | '.join(map(show, cells))} | {kind} |"
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
    parser.add_argument("--seeds", default="0,1", help="of the trials")
    parser.add_argument("--part", default="1/1", help="i/n: every n-th run from the i-th on")
    parser.add_argument("--price", type=float, default=0.02, help="lambda of the objective, nats")
    parser.add_argument("--least", type=float, default=0.005, help="lead below which growing does not pay, nats")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    part, parts = map(int, given.part.split("/"))
    tasks = [find_task(name) for name in given.tasks.split(",")]
    wanted = list(runs_of(tasks, [int(seed) for seed in given.seeds.split(",")]))
    for run, task in [] if given.table else wanted[part - 1 :: parts]:
        if run not in read_runs(given.out):
            entry = {"run": {name: getattr(run, name) for name in Run.__slots__}, "curve": measure(run, replace(task))}
            with given.out.open("a") as file:
                file.write(json.dumps(entry) + "\n")
    table(read_runs(given.out), given.price, given.least)
    return 0


if __name__ == "__main__":
    sys.exit(main())
