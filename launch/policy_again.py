"""Runs some cells of a comparison over tasks again by the engine of a run, and shows how far apart the two are.

    python launch/policy_again.py policy_cpu --out compare/policy_cpu             # 20 cells, drawn by --seed
    python launch/policy_again.py policy_cpu --out compare/policy_cpu --cells 5

In float32 a sum in another order moves a loss by 1e-7, and training carries that on: two lives of one host part slowly,
as they do between two processors. So both ends are shown: the first tick, before anything could part, and the last.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from esper.compare.arms import read_compare
from esper.compare.cells import CellStore
from esper.compare.growth import build_arm, read_growth_compare
from esper.run.trials.cells import Cell, Job, run_cells
from esper.run.trials.parts import TrialMaker
from esper.run.trials.plain import PlainTrials
from esper.simic.env.tasks import find_task


def by_engine(places: int, settings: Mapping[str, Any]) -> PlainTrials:
    """Hosts one after the other."""

    def config(job: Job, seed: int) -> Any:
        return job.config(seed, settings)

    return PlainTrials(places, maker=TrialMaker(config))


def main() -> int:
    """Draws cells, runs them, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the comparison, as for esper compare")
    parser.add_argument("--out", type=Path, required=True, help="its folder")
    parser.add_argument("--cells", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config = read_growth_compare(*read_compare(given.name, []))
    store = CellStore(config, given.out)
    finished = [one for one in store.wanted() if (one.says, one.seed) in store.done]
    draws = np.random.default_rng(given.seed).permutation(len(finished))[: given.cells]
    print("| arm | task | seed | ticks | loss apart, first tick | last tick | FLOPs, births, prunes |", flush=True)
    print("|---|---|---|---|---|---|---|", flush=True)
    ends = []
    for one in (finished[place] for place in draws):
        task = find_task(one.task)
        arms = {one.arm: build_arm(config.arms[one.arm], task)[0]}
        cell = Cell(one.task, one.seed, one.arm)
        ((_, again),) = run_cells([cell], arms, {one.task: task}, places=1, make_trials=by_engine)
        before = store.done[one.says, one.seed]
        first, last = (abs(again[at].loss - before[at].loss) for at in (0, -1))
        same = [(p.flops, p.births, p.prunes) for p in again] == [(p.flops, p.births, p.prunes) for p in before]
        ends.append(last)
        print(
            f"| {one.arm} | {one.task} | {one.seed} | {len(again)} | {first:.1e} | {last:.1e} | "
            f"{'equal' if same else 'not equal'} |",
            flush=True,
        )
    print(f"\nlast tick: middle {np.median(ends):.1e}, largest {max(ends):.1e} nats")
    return 0


if __name__ == "__main__":
    sys.exit(main())
