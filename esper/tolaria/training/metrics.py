"""The task's own metrics at each tick: computed from the agreed sums, the same on every rank, and kept in the state."""

from collections.abc import Mapping
from dataclasses import replace

from esper.accord.state import MetricReading, RunState
from esper.leyline.evidence import measured
from esper.tolaria.lockstep.observers import Observer, Turn
from esper.tolaria.tasks.task import Task

SUMS = ("loss", "loss_sq", "correct", "correct_sq", "count")


def part_values(task: Task, sums: Mapping[str, float], part: str) -> dict[str, float]:
    """The metrics of one part from the sums of a tick.

    Args:
        task: has the metrics.
        sums: the reduced observe vector by name.
        part: ``train`` or ``validation``.
    """
    own = {name: sums.get(f"{part}_{name}", 0.0) for name in SUMS}
    return task.values({**own, **{name: sums[f"{part}_sum_{name}"] for name in task.columns}})


def absorb_metrics(task: Task, state: RunState, sums: Mapping[str, float]) -> RunState:
    """The state with the metrics of this tick; those of validation stay until it is measured again."""
    found = {entry.name: entry for entry in state.metrics if entry.name.startswith("validation_")}
    parts = {"train": sums["train_count"], "validation": sums["validation_count"]}
    for part, count in parts.items():
        if count > 0:
            found = {name: entry for name, entry in found.items() if not name.startswith(f"{part}_")}
        if count > 0 and sums.get(f"{part}_nonfinite", 0.0) == 0:
            for name, value in part_values(task, sums, part).items():
                reading = measured(value, tick=state.tick, n=int(count))
                found[f"{part}_{name}"] = MetricReading(name=f"{part}_{name}", reading=reading)
    return replace(state, metrics=tuple(found[name] for name in sorted(found)))


class TaskMetrics(Observer):
    """Keeps the task's metrics in the agreed state."""

    name, governs = "metrics", True

    def __init__(self, task: Task) -> None:
        self.task = task

    def after_observe(self, turn: Turn) -> None:
        """Adds this tick's metrics."""
        turn.state = absorb_metrics(self.task, turn.state, turn.sums)
