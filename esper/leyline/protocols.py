"""Protocols through which rooms work together without importing each other: values go up, protocols go down.

Trials are hosts in training as code that learns a controller sees them: trained by the rules of a run, with the same
record, gates, looks, account and observation. A trial ends when its task's FLOP budget is spent, or when its run has
come apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar, runtime_checkable

from esper.leyline.commands import Command
from esper.leyline.events import Event
from esper.leyline.evidence import Reading
from esper.leyline.observation import Observation


@runtime_checkable
class Controller(Protocol):
    """Decides on rank 0, from the agreed observation alone.

    ``decide`` returns at most one command per slot; slots that it leaves out wait. It must be a deterministic function
    of its state and the observation: no wall clock, no global random numbers. ``state_dict`` returns plain data (see
    `esper.leyline.plain`) that ``load_state_dict`` restores completely; a missing or unknown key is an error.
    """

    name: str

    def decide(self, observation: Observation) -> list[Command]:
        """Returns the commands for this tick."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that ``state_dict`` returned."""


class EventSink(Protocol):
    """Takes events; never raises an exception into training."""

    def emit(self, event: Event) -> None:
        """Takes one event without blocking."""

    def flush(self) -> None:
        """Returns when all events taken so far have been written."""

    def close(self) -> None:
        """Flushes and releases the sink's resources; safe to call twice."""


class NullSink:
    """The sink that does nothing."""

    def emit(self, event: Event) -> None:
        """Drops the event."""

    def flush(self) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class Ending(StrEnum):
    """Why a trial is over.

    RUNNING: it is not. SPENT: its FLOP budget is spent. DIVERGED: the governor found that it had come apart, or too
    many steps in a row were skipped. CUT: something outside the task ended it.
    """

    RUNNING = "running"
    SPENT = "spent"
    DIVERGED = "diverged"
    CUT = "cut"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One host at one tick, before the next decision.

    Fields:
        observation: what a controller sees; ``remaining`` is the unspent share of the FLOP budget.
        flops: training FLOPs spent by the record's account: probes, shadow forwards and dead seeds included.
        budget: FLOPs of the task.
        parameters: of the host and of every seed that is in it.
        validation_loss: loss on the validation part (nats per sample).
        births: births committed since the last report.
        prunes: seeds that were pruned since the last report.
        ending: whether the trial is over, and why.
    """

    observation: Observation
    flops: int
    budget: int
    parameters: int
    validation_loss: Reading
    births: int
    prunes: int
    ending: Ending


Task = TypeVar("Task", contravariant=True)


class Trials(Protocol[Task]):
    """N hosts in training, taken from tick to tick together; none changes the numbers of another."""

    def __len__(self) -> int:
        """Returns N."""

    def begin(self, index: int, task: Task, seed: int) -> Report:
        """Starts a trial at place ``index``, in place of the one that was there, and trains it to its first tick.

        Returns the report of that tick, before any decision.

        Args:
            index: 0 to N - 1.
            task: what is to be learned, by which host, with which budget.
            seed: of the host's first weights, its order of the data, and its seeds' weights.
        """

    def begin_many(self, trials: Sequence[tuple[int, Task, int]]) -> list[Report]:
        """`begin` for several places, each once: (index, task, seed) each. They may train their first tick together."""

    def advance(self, commands: Sequence[Sequence[Command]]) -> tuple[Report, ...]:
        """Commits one tick's commands for each host, trains each to its next tick, and reports.

        A trial that is over stays as it is, and its report is the last one again, with no births or prunes.
        """
