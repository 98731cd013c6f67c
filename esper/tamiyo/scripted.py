"""A controller that proposes the commands it is handed: for tools that decide elsewhere, such as `esper.drill`."""

from collections.abc import Sequence

from esper.leyline.commands import Command
from esper.leyline.observation import Observation
from esper.tamiyo.common import Stateless


class Scripted(Stateless):
    """Proposes ``commands`` at each tick, legal or not.

    Attributes:
        commands: the proposals of the next tick; the owner sets them before each tick.
    """

    name = "scripted"

    def __init__(self) -> None:
        self.commands: Sequence[Command] = ()

    def decide(self, observation: Observation) -> list[Command]:
        """Returns the commands as they were set."""
        return list(self.commands)
