"""Protocols through which rooms work together without importing each other: values go up, protocols go down."""

from typing import Any, Protocol, runtime_checkable

from esper.leyline.commands import Command
from esper.leyline.events import Event
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
