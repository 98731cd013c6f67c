"""Where people's orders come into a tick: a desk on rank 0, asked before the controller.

`esper.tolaria.orders.desk` is the one of a run; without it there are no orders.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from esper.accord.effects import Outcome
from esper.accord.state import RunState, Terms
from esper.leyline.commands import Command
from esper.leyline.orders.verbs import NO_ORDER, RunOrder


@dataclass(frozen=True, slots=True)
class Taken:
    """The orders that one tick takes.

    Fields:
        commands: at most one for each slot; it comes before the controller's own.
        order: the one to the whole run.
    """

    commands: Mapping[str, Command] = field(default_factory=dict)
    order: RunOrder = NO_ORDER


class Desk(Protocol):
    """Hands orders in and their outcome back; never raises, and never waits for a person or a file of theirs."""

    def begin(self, state: RunState) -> None:
        """The run begins, or goes on from this state."""

    def take(self, state: RunState, terms: Terms, *, stage_ticks: int) -> Taken:
        """Returns the orders of this tick, which are in the journal by then.

        Args:
            state: with this tick's evidence absorbed.
            terms: of the run.
            stage_ticks: ticks that a staged seed may stay not ready.
        """

    def tell(self, state: RunState, outcome: Outcome | None) -> None:
        """Answers the orders of this tick.

        Args:
            state: the agreed state after it.
            outcome: of the reducer; None after a panic, whose decision is not followed.
        """


class NoDesk:
    """Takes no orders."""

    def begin(self, state: RunState) -> None:
        """Does nothing."""

    def take(self, state: RunState, terms: Terms, *, stage_ticks: int) -> Taken:
        """Returns none."""
        return Taken()

    def tell(self, state: RunState, outcome: Outcome | None) -> None:
        """Does nothing."""


NO_DESK = NoDesk()
