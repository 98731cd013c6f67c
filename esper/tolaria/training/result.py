"""The result of a finished run. The test part is read once, with the checkpoint that validation chose."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from esper.accord.state import RunState
from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import CheckpointError
from esper.leyline.events.task import TaskInfo
from esper.leyline.evidence import ABSENT, Reading, estimate_mean
from esper.tolaria.checkpoint.snapshot import read_common
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.data.parts import Part
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.planting import rebuild_network as rebuild_record
from esper.tolaria.lockstep.ema import write_averages
from esper.tolaria.ranks.world import World
from esper.tolaria.training.evaluate import Evaluator


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """The result of a finished run.

    Fields:
        step: optimizer step at which it ended.
        tick: control tick at which it ended.
        validation_loss: at the end, in the unit of the task's loss.
        validation_accuracy: at the end, share of correct answers; absent where there is no right or wrong.
        best_step: checkpoint that validation chose; None if none was scored.
        test_loss: of that checkpoint, read once.
        test_accuracy: of that checkpoint, read once.
        task: names, units and directions.
        validation_metrics: the task's further metrics at the end.
        test_metrics: those of the best checkpoint.
        objective: the validation metric that a sweep optimises, at the end.
        samples: training samples seen.
        flops: training FLOPs spent (`esper.accord.account`).
        parameters: number of parameters of the network at the end.
        topology: the seeds in the network at the end, by slot: blueprint, stage, alpha, and operator.
    """

    step: int
    tick: int
    validation_loss: Reading
    validation_accuracy: Reading
    best_step: int | None
    test_loss: Reading
    test_accuracy: Reading
    task: TaskInfo
    validation_metrics: dict[str, float]
    test_metrics: dict[str, float]
    objective: float | None
    samples: int
    flops: int | None
    parameters: int
    topology: dict[str, dict[str, Any]]


def topology_of(state: RunState) -> dict[str, dict[str, Any]]:
    """The seeds that take part in the network's forward, as plain data."""
    return {
        entry.slot: {
            "blueprint": entry.blueprint,
            "stage": entry.stage.name,
            "alpha": entry.alpha(state.step),
            "operator": None if entry.operator is None else entry.operator.name,
        }
        for entry in state.slots
        if entry.stage.is_blended and entry.alpha(state.step) > 0
    }


@dataclass(frozen=True, slots=True)
class PartScores:
    """What a network is worth on a part: loss, accuracy (absent where there is none), the task's metrics."""

    loss: Reading
    accuracy: Reading
    metrics: dict[str, float]


def build_result(
    state: RunState, grown: Grown, task: TaskInfo, *, objective: float | None, best: int | None, test: PartScores
) -> RunResult:
    """The result of a run that ended in ``state``.

    Args:
        state: the agreed record at the end.
        grown: the network at the end.
        task: names, units and directions.
        objective: the validation metric that a sweep optimises.
        best: step of the checkpoint that validation chose.
        test: its scores on the test part.
    """
    return RunResult(
        step=state.step,
        tick=state.tick,
        validation_loss=state.validation_loss,
        validation_accuracy=state.validation_accuracy,
        best_step=best,
        test_loss=test.loss,
        test_accuracy=test.accuracy,
        task=task,
        validation_metrics=_of_validation(state),
        test_metrics=test.metrics,
        objective=objective,
        samples=state.samples,
        flops=state.flops,
        parameters=sum(p.numel() for p in grown.model.parameters()),
        topology=topology_of(state),
    )


def rebuild_checkpoint(
    store: CheckpointStore, step: int, fresh: Callable[[], Grown], growth: Growth, *, averaged: bool = False
) -> Grown:
    """Builds the network of a checkpoint, beside the one that was trained.

    Args:
        store: the checkpoints on disk.
        step: of a verified checkpoint.
        fresh: builds the host with empty slots.
        growth: holds what seeds are built by.
        averaged: whether the weights are to be the average of the weights that lies in it.
    """
    payload, state = read_common(store, step)
    device = growth.world.device
    with undisturbed(device):  # a fresh host is seeded alike on every rank; the ranks' own streams must not change
        grown = fresh()
    rebuild_record(
        grown,
        state,
        payload["model"],
        str(store.path(step) / "state.pt"),
        run_seed=growth.run_seed,
        dtype=growth.dtype,
        device=device,
        incubation=growth.terms.slots_config.incubation,
    )
    if averaged:
        write_averages(grown, payload, str(store.path(step) / "state.pt"))
    return grown


def choose_best(store: CheckpointStore, world: World, report: Callable[[str, str], None]) -> int | None:
    """Step of the checkpoint that validation chose, as rank 0 reads it; the same on every rank. None without one.

    Args:
        store: the checkpoints on disk.
        world: the ranks.
        report: called with what is wrong with a better checkpoint that was left out, and where it lies.
    """
    best = -1
    for step in store.rank_steps() if world.rank == 0 else ():
        try:
            store.verify(step, ("state.pt",))
        except CheckpointError as error:
            report(f"the test part is not read on a damaged checkpoint: {error}", str(store.path(step)))
            continue
        best = step
        break
    chosen = torch.tensor([best], dtype=torch.int64)
    world.all_reduce(chosen, dist.ReduceOp.MAX, what="choice of checkpoint", on="default")
    return None if int(chosen) < 0 else int(chosen)


def _of_validation(state: RunState) -> dict[str, float]:
    """The task's further metrics of the latest validation."""
    prefix = "validation_"
    return {
        entry.name.removeprefix(prefix): entry.reading.value
        for entry in state.metrics
        if entry.name.startswith(prefix) and entry.reading.value is not None
    }


def read_part(evaluator: Evaluator, part: Part, world: World, tick: int) -> PartScores:
    """Loss, accuracy and metrics on a whole part, every sample counted once."""
    task, own = evaluator.task, evaluator.part_sums(part)
    vector = torch.tensor(list(own.values()), dtype=torch.float64)
    world.all_reduce(vector, dist.ReduceOp.SUM, what="test", on="default")
    sums = dict(zip(own, vector.tolist(), strict=True))
    loss, accuracy = (
        estimate_mean(int(sums["count"]), sums[name], sums[f"{name}_sq"], tick=tick, min_samples=2)
        for name in ("loss", "correct")
    )
    metrics = task.values({name.removeprefix("sum_"): value for name, value in sums.items()}) if task.metrics else {}
    return PartScores(loss, accuracy if task.graded else ABSENT, metrics)
