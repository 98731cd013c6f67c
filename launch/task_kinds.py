"""Measures in which tasks of a growth policy growing pays, and when; type the command again and it goes on.

    python launch/task_kinds.py --out kinds.jsonl                      # 40 tasks x 4 arms x 3 seeds: half an hour
    python launch/task_kinds.py --out kinds.jsonl --tasks d1,r1 --seeds 0,1
    python launch/task_kinds.py --out kinds.jsonl --table              # the table alone, of what has been measured

Arms of one task and seed share first weights, data, its order, and the FLOP budget by the record's account:

    none       the bare host
    planted    a wider or deeper network from the first step: the host with a seed in it
    now        the same seed, born at the first tick
    late       the same seed, born when half of the budget is spent

Growing pays in a task if the mean of the best arm that grows is below that of `none` by two standard errors of the
paired difference over seeds. It pays *at once* if the arm `now` is no worse than `none` at the same FLOPs when a third
of the budget is spent after its birth, and *late* if it is worse then by more than one standard error, or if its lead
then is less than a quarter of its lead at the end. The objective is that of the reward: validation loss, and
``lambda`` times the logarithm of the parameters relative to the bare host.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from esper.leyline.commands import Command
from esper.leyline.protocols import Ending, Report
from esper.leyline.stages import Op, Stage
from esper.run.trials.config import trial_config
from esper.run.trials.parts import TrialMaker
from esper.run.trials.plain import PlainTrials
from esper.simic.env.tasks import REGISTERED, Family, GrowthTask, Purpose, find_task

ARMS = ("none", "planted", "now", "late")
SEEDS_OF = {Family.DIGITS: ("r0c0", "conv_light"), Family.BYTES: ("r0c0", "mlp"), Family.RECALL: ("r0c0", "attention")}


def command_of(report: Report, arm: str, slot: str, blueprint: str) -> list[Command]:
    """What an arm says at a tick."""
    view = report.observation.slot(slot)
    if arm in ("none", "planted") or view.staged:
        return []
    if view.stage is Stage.EMPTY:
        due = arm == "now" or report.flops >= report.budget / 2
        birth = Command(slot=slot, op=Op.GERMINATE, blueprint=blueprint, ticks=1)
        return [birth] if due and not view.generation else []
    return [Command(slot=slot, op=Op.ADVANCE)] if view.stage in (Stage.GERMINATED, Stage.TRAINING) else []


def measure(trials: PlainTrials, task: GrowthTask, arm: str, seed: int) -> list[list[float]]:
    """Trains one host; returns (FLOPs, validation loss, parameters relative to the bare host) at each tick."""
    slot, blueprint = SEEDS_OF[task.family]
    planted = {"slots.planted": {slot: blueprint}} if arm == "planted" else {}
    trials.maker.configure = lambda task, seed: trial_config(task, seed, planted)
    report = trials.begin(0, task, seed)
    bare = trials.maker.shared(task, seed)[0].parameters
    curve = []
    while True:
        loss = report.validation_loss.value
        curve.append([report.flops / report.budget, float("inf") if loss is None else loss, report.parameters / bare])
        if report.ending is not Ending.RUNNING:
            return curve
        (report,) = trials.advance([command_of(report, arm, slot, blueprint)])


def loss_at(curve: Sequence[Sequence[float]], share: float) -> float:
    """Validation loss when a share of the budget was spent, interpolated linearly."""
    before = curve[0]
    for point in curve:
        if point[0] >= share:
            across = point[0] - before[0]
            return point[1] if across == 0 else before[1] + (point[1] - before[1]) * (share - before[0]) / across
        before = point
    return curve[-1][1]


def paired(differences: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    spread = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("inf")
    return statistics.fmean(differences), spread


def kind_of(curves: Mapping[tuple[str, int], Sequence[Sequence[float]]], price: float) -> dict[str, Any]:
    """The kind of one task from its curves by (arm, seed), with what it follows from."""
    seeds = sorted({seed for _, seed in curves if all((arm, seed) in curves for arm in ARMS)})
    leads: dict[str, tuple[float, float]] = {}
    for arm in ARMS[1:]:
        none, grown = ([curves[which, seed] for seed in seeds] for which in ("none", arm))
        ends = [
            loss_at(bare, 1.0) - loss_at(more, 1.0) - price * math.log(more[-1][2])
            for bare, more in zip(none, grown, strict=True)
        ]
        leads[arm] = paired(ends)
    early = paired([loss_at(curves["none", seed], 0.4) - loss_at(curves["now", seed], 0.4) for seed in seeds])
    best = max(leads, key=lambda arm: leads[arm][0])
    gain, error = leads[best]
    kind = "never"
    if gain > 2 * error:
        slow = early[0] < -early[1] or early[0] < leads["now"][0] / 4
        kind = "late" if slow else "at once"
    none_end = statistics.fmean(loss_at(curves["none", seed], 1.0) for seed in seeds)
    return {"kind": kind, "best": best, "seeds": len(seeds), "none": none_end, "early": early, **leads}


def table(path: Path, price: float) -> None:
    """Prints the table of the kinds of all tasks that have been measured in every arm."""
    rows: dict[str, dict[tuple[str, int], Any]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        entry = json.loads(line)
        rows.setdefault(entry["task"], {})[entry["arm"], entry["seed"]] = entry["curve"]
    print("| task | family | host | samples | noise | steps | none | planted | now | late | early | kind |")
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for tasks in REGISTERED.values():
        for task in tasks:
            curves = rows.get(task.name, {})
            if not any(all((arm, seed) in curves for arm in ARMS) for _, seed in curves):
                continue
            found = kind_of(curves, price)
            leads = " | ".join(f"{found[arm][0]:+.3f} ± {found[arm][1]:.3f}" for arm in (*ARMS[1:], "early"))
            print(
                f"| {task.name} | {task.family.value} | {task.width}x{task.depth} | {task.samples} | {task.noise:g} | "
                f"{task.steps} | {found['none']:.3f} | {leads} | {found['kind']} |"
            )


def main() -> int:
    """Measures what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a line a run; what stands there is kept")
    parser.add_argument("--tasks", default=",".join(t.name for p in Purpose for t in REGISTERED[p]), help="names")
    parser.add_argument("--seeds", default="0,1,2", help="of the trials")
    parser.add_argument("--price", type=float, default=0.02, help="lambda of the objective, nats")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    given = parser.parse_args()
    torch.set_num_threads(1)
    tasks = [find_task(name) for name in given.tasks.split(",")]
    done = set()
    if given.out.exists():
        done = {(e["task"], e["arm"], e["seed"]) for e in map(json.loads, given.out.read_text().splitlines())}
    trials = PlainTrials(1, maker=TrialMaker())
    for seed in map(int, [] if given.table else given.seeds.split(",")):
        for task in tasks:
            for arm in ARMS:
                if (task.name, arm, seed) not in done:
                    curve = measure(trials, replace(task), arm, seed)
                    with given.out.open("a") as file:
                        file.write(json.dumps({"task": task.name, "arm": arm, "seed": seed, "curve": curve}) + "\n")
    table(given.out, given.price)
    return 0


if __name__ == "__main__":
    sys.exit(main())
