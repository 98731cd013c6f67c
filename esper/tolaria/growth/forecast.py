"""What seeds are forecast to take of a rank's memory: a formula of agreed numbers, so that a cap may refuse a birth.

See `esper.kasmina.memory` for what is counted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from esper.kasmina.axes.site import Site
from esper.kasmina.memory import SeedMemory, seed_memory
from esper.leyline.legality import COPY
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
        copies: what copies of the host's blocks need, by slot.
    """

    batch: int
    moments: int
    ranks: int
    dtype: torch.dtype
    copies: Mapping[str, SeedMemory]

    def bytes_of(self, slot: str, site: Site, blueprint: str) -> int:
        """Returns the forecast for a blueprint in a slot."""
        if blueprint == COPY:
            need = self.copies[slot]
        else:
            need = seed_memory(site.topology, blueprint, site.dim, site.shape, self.dtype)
        return need.forecast(self.batch, number=self.dtype.itemsize, moments=self.moments, ranks=self.ranks)
