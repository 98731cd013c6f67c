"""Cells of a comparison: what their controllers draw."""

from dataclasses import replace

from esper.run.trials.cells import Arm, Cell, draws_seed, run_cells
from esper.simic.env.tasks import Family, GrowthTask

TASK = GrowthTask(name="a", family=Family.RECALL, width=8, depth=1, samples=90, noise=0.0, steps=30, every=5)
QUICK = {"gates.evidence": "observe", "slots.embargo_ticks": 1}


def test_each_task_and_seed_has_draws_of_its_own_and_arms_share_them() -> None:
    tasks = {name: replace(TASK, name=name) for name in "abcd"}
    seeds = {draws_seed(Cell(task, seed, "random")) for task in tasks for seed in range(4)}
    assert len(seeds) == 16
    assert draws_seed(Cell("a", 1, "random")) == draws_seed(Cell("a", 1, "sampled"))
    asked: dict[str, int] = {}

    def note(slots: tuple[str, ...], seed: int) -> object:
        asked[str(len(asked))] = seed
        return type("Waits", (), {"decide": lambda self, observation: []})()

    cells = [Cell(task, 1, "noted") for task in "ab"]
    ended = dict(run_cells(cells, {"noted": Arm(controller=note)}, tasks, settings=QUICK))
    assert set(ended) == set(cells)
    assert sorted(asked.values()) == sorted(draws_seed(cell) for cell in cells), "by task, not by seed alone"
