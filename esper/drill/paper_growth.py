"""Growth for an exploration: seeds of one number, no optimizer, no wrapper."""

from typing import Any

import torch
from torch import nn

from esper.accord.effects import Prepare
from esper.accord.state import RunState, Terms
from esper.kasmina.slots.grown import Grown
from esper.leyline.alpha import Operator
from esper.tolaria.growth.growth import Growth
from esper.tolaria.growth.parameters import ParameterChecker
from esper.tolaria.growth.planting import seat
from esper.tolaria.ranks.world import World


class Leaf(nn.Module):
    """A seed with a single parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)


class _NoOwner:
    optimizer: Any = None  # only copies of a host's block take moments of it

    def gradient_set(self) -> tuple[str, ...]:
        return ()

    def release(self, slot: str) -> None:
        """Does nothing: it owns no parameter."""


class PaperGrowth(Growth):
    """The shipped `Growth` with tiny seeds, no optimizer and no wrapper, so that it can jump to any state."""

    def __init__(self, grown: Grown, world: World, terms: Terms) -> None:
        owner: Any = _NoOwner()
        self.grown, self.owner, self.world, self.terms = grown, owner, world, terms
        self.library = self.compiler = None
        self.compiled, self.parameters = False, ParameterChecker(grown, owner)
        self._regions, self.waiting, self.staged, self.vetoes, self.failures = {}, {}, {}, {}, {}
        self.newborns = {}

    def _prepare(self, effect: Prepare) -> None:
        self.staged[effect.slot] = Leaf()
        self.newborns[effect.slot] = 1

    def settle(self, check: Any) -> float:
        """Lets every seed be born: paper has no features."""
        return 0.0

    def plant(self, slot: str, seed: nn.Module, operator: Operator | None = None) -> None:
        """Plants a seed without an optimizer."""
        self.grown.slots[slot].plant(seed)

    def follow(self, state: RunState, *, force: bool = False) -> float | None:
        """Seats every slot; there is no wrapper."""
        for entry in state.slots:
            seat(self.grown.slots[entry.slot], entry, state.step, self.terms.slots_config.incubation)
        return None

    def jump(self, state: RunState) -> None:
        """Makes the model what ``state`` says, from any other state, with fresh seeds."""
        self.vetoes.clear()
        self.failures.clear()
        self.staged = {entry.slot: Leaf() for entry in state.slots if entry.staged is not None}
        self.newborns = dict.fromkeys(self.staged, 1)
        for entry in state.slots:
            holder = self.grown.slots[entry.slot]
            holder.uproot()
            if entry.stage.has_seed:
                holder.plant(Leaf())
        self.follow(state)
