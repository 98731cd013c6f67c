"""Builds the observers of a run in order: the saves first, then the governor, then those that the caller brings."""

from collections.abc import Sequence
from typing import Any, Protocol

from esper.accord.state import RunState
from esper.tolaria.checkpoint.saves import Saves
from esper.tolaria.lockstep.observers import Observer
from esper.tolaria.training.governor import Governor, GovernorObserver, Recovery


class RunLoop(Protocol):
    """The methods of the training loop that the governor's observer calls."""

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
    if governor is None:
        return [*further, saves]
    watching = GovernorObserver(
        governor,
        settle_saves=saves.settle_now,
        narrator=saves.narrator,
        marks=saves.heartbeat,
        collect=loop.collect,
        go_back=loop.go_back,
        from_step=loop.oldest_step,
    )
    return [*further, saves, watching]  # what a save holds has followed by then
