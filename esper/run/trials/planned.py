"""Growth by plan, without a look at any evidence: what a controller has to beat."""

from collections.abc import Mapping

from esper.leyline.commands import Command
from esper.leyline.observation import Observation
from esper.leyline.stages import Op, Stage
from esper.tamiyo.common import Stateless


class Planned(Stateless):
    """Grows one seed in each of some slots once a share of the budget is spent; each advances as gates let it.

    Args:
        seeds: blueprint by slot.
        after: share of the budget, 0 to 1; 0 is at the first tick.
    """

    name = "planned"

    def __init__(self, seeds: Mapping[str, str], after: float) -> None:
        self._seeds, self._after = seeds, after

    def decide(self, observation: Observation) -> list[Command]:
        """Returns at most one command for each of the slots."""
        said = []
        for slot, blueprint in self._seeds.items():
            view = observation.slot(slot)
            if view.stage is Stage.EMPTY and not view.staged and not view.generation:
                if self._after == 0 or observation.remaining <= 1 - self._after:
                    said.append(Command(slot=slot, op=Op.GERMINATE, blueprint=blueprint, ticks=1))
            elif view.stage in (Stage.GERMINATED, Stage.TRAINING):
                said.append(Command(slot=slot, op=Op.ADVANCE))
        return said
