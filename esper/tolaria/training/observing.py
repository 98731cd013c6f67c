"""Builds the observers of a run in order: average of the weights, the caller's own, saves, governor."""

from collections.abc import Sequence
from typing import Any, Protocol

from esper.accord.state import RunState
from esper.kasmina.slots.grown import Grown
from esper.tolaria.checkpoint.saves import Saves
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.lockstep.ema import WeightAverage
from esper.tolaria.lockstep.observers import Observer
from esper.tolaria.lockstep.tick import Cycle
from esper.tolaria.training.config import Precision, TrainerConfig
from esper.tolaria.training.evaluate import Evaluator
from esper.tolaria.training.governor import Governor, GovernorObserver, Recovery
from esper.tolaria.training.precision import LossScale, Unscaled


class RunLoop(Protocol):
    """What the observers need of the training loop."""

    average: WeightAverage | None
    cycle: Cycle
    grown: Grown

    def collect(self, state: RunState) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything of the run in a state: what is equal on all ranks, and what is this rank's own."""

    def go_back(self, present: RunState, recovery: Recovery, began: float) -> tuple[RunState, float | None]:
        """Takes the run back to a generation.

        Args:
            present: the state that panicked.
            recovery: the generation, and how the replay differs.
            began: clock (`time.perf_counter`) at the verdict.

        Returns:
            The new state, and milliseconds of the wrap.
        """

    def oldest_step(self) -> int:
        """Optimizer step before which no generation may be chosen."""


def build_average(trainer: TrainerConfig, evaluator: Evaluator) -> WeightAverage | None:
    """The average of the weights that the config asks for, which validation reads if it says so."""
    if trainer.ema is None:
        return None
    average = WeightAverage(evaluator.grown, trainer.ema)
    if trainer.ema_validate:
        evaluator.validating = average.applied
    return average


def build_scaling(trainer: TrainerConfig, owner: ParameterOwner, evaluator: Evaluator) -> Unscaled:
    """What the run's optimizer steps by, and copies of the network with it."""
    scaling = LossScale(owner) if trainer.precision is Precision.FP16 else Unscaled(owner)
    evaluator.loss_scale = lambda: scaling.value
    return scaling


def build_observers(
    loop: RunLoop, saves: Saves, governor: Governor | None, further: Sequence[Observer]
) -> Sequence[Observer]:
    """All observers of a run.

    Args:
        loop: the training loop.
        saves: the observer that saves.
        governor: of this rank; None if the run has none.
        further: those that the caller brings; they come first, so that a save holds what they remember of its tick.
    """
    before = [*further] if loop.average is None else [loop.average, *further]
    if governor is None:
        return [*before, saves]
    governor.apart = lambda: loop.cycle.lockstep.may_differ(loop.grown)
    watching = GovernorObserver(
        governor,
        settle_saves=saves.settle_now,
        narrator=saves.narrator,
        marks=saves.heartbeat,
        collect=loop.collect,
        go_back=loop.go_back,
        from_step=loop.oldest_step,
    )
    return [*before, saves, watching]  # what a save holds has followed by then
