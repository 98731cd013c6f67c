"""Protocols that let rooms meet without knowing each other: values go up, protocols go down."""

from typing import Any, Protocol, runtime_checkable

from esper.leyline.commands import Command
from esper.leyline.events import Event
from esper.leyline.observation import Observation


@runtime_checkable
class Controller(Protocol):
    """Decides on rank 0, from the agreed observation alone.

    ``decide`` returns at most one command per slot; slots it leaves out wait. It must be a deterministic function of
    its state and the observation: no wall clock, no global random numbers. ``state_dict`` is plain data (see
    `esper.leyline.plain`) that ``load_state_dict`` takes back whole; a missing or unknown key there is an error.
    """

    name: str

    def decide(self, observation: Observation) -> list[Command]:
        """Commands for this tick."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes ``state_dict`` back."""


class EventSink(Protocol):
    """Takes events; never raises into training."""

    def emit(self, event: Event) -> None:
        """Takes one event without blocking."""

    def flush(self) -> None:
        """Returns when everything taken so far has been written."""

    def close(self) -> None:
        """Flushes and releases what the sink holds; safe to call twice."""


class NullSink:
    """The sink that does nothing."""

    def emit(self, event: Event) -> None:
        """Drops it."""

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""
