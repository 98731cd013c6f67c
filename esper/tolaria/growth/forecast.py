"""What seeds are forecast to take of a rank's memory: a formula of agreed numbers, so that a cap may refuse a birth.

See `esper.kasmina.memory` for what is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from esper.accord.config import SlotsConfig
from esper.kasmina.axes.site import Site
from esper.kasmina.memory import HeardMemory, SeedMemory, seed_memory, shadow_memory
from esper.kasmina.slots.grown import Grown
from esper.leyline.legality import COPY
from esper.leyline.stages import Incubation
from esper.tolaria.growth.config import OptimConfig, OptimizerKind


def moments_of(optim: OptimConfig) -> int:
    """Numbers that the trainer's optimizer keeps for each parameter."""
    return 2 if optim.kind is OptimizerKind.ADAMW else int(optim.momentum > 0)


def moments_kept(optimizer: Any) -> int:
    """Numbers that an optimizer of a user's keeps for each parameter: none or one for SGD, else two, as Adam does."""
    if isinstance(optimizer, torch.optim.SGD):
        return int(any(group["momentum"] > 0 for group in optimizer.param_groups))
    return 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Forecasts the bytes of a seed.

    Fields:
        batch: samples of one forward on a rank.
        moments: numbers that the optimizer keeps for each parameter.
        ranks: ranks of the run.
        dtype: number format of seeds.
        heard: what was counted in a forward of the host: its blocks' copies, and shadow forwards.
    """

    batch: int
    moments: int
    ranks: int
    dtype: torch.dtype
    heard: HeardMemory

    def shadow_of(self, slot: str, parameters: int) -> int:
        """Returns the bytes of a shadow forward of a seed with so many parameters in a slot; 0 where there is none."""
        each = self.heard.shadows.get(slot)
        return 0 if each is None or parameters == 0 else self.batch * each + parameters * self.dtype.itemsize

    def bytes_of(self, slot: str, site: Site, blueprint: str) -> int:
        """Returns the forecast for a blueprint in a slot, a shadow forward included."""
        if blueprint == COPY:
            need = self.heard.copies[slot]
        else:
            need = seed_memory(site.topology, blueprint, site.dim, site.shape, self.dtype)
        own = need.forecast(self.batch, number=self.dtype.itemsize, moments=self.moments, ranks=self.ranks)
        return own + self.shadow_of(slot, need.parameters)


def hear_memory(grown: Grown, copies: Mapping[str, SeedMemory], example: Any, slots: SlotsConfig) -> HeardMemory:
    """Counts what is told by a forward of the host.

    Args:
        grown: the model, without seeds.
        copies: what copies of the host's blocks need, by slot.
        example: one batch of the model's inputs.
        slots: its section of the settings.
    """
    shadows = shadow_memory(grown, example) if slots.incubation is Incubation.SHADOW else {}
    return HeardMemory(copies=dict(copies), shadows=shadows)
