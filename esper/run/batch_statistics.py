"""Hosts that normalise over a batch (BatchNorm): every forward must have samples enough, and none that do not count.

The last batch of an epoch has the rest of the samples, which may leave a rank, or a piece of `trainer.accumulate`, with
one sample or with none. One sample has no variance where features are vectors. A piece without samples becomes a
stand-in of weight 0 (`esper.tolaria.data.sampler`), which would enter the statistics all the same. Both are known
before the first step. `trainer.drop_last` leaves that batch out.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from esper.config.tree import EsperConfig
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import arguments
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import bounds
from esper.tolaria.ranks.computed import untouched
from esper.tolaria.training.config import TrainerConfig
from esper.tolaria.training.length import forwards_of
from esper.tolaria.training.precision import autocast, dtype_of


def smallest_piece(samples: int, ranks: int, accumulate: int) -> int:
    """Samples in the smallest piece of a global batch of ``samples``; 0 where a stand-in takes the place of one."""
    first, last = bounds(samples, ranks - 1, ranks)  # the last rank has the fewest
    begin, end = bounds(last - first, accumulate - 1, accumulate)
    return end - begin


def _fits(config: TrainerConfig, size: int, batch: int, ranks: int, least: int) -> bool:
    """Whether every piece of every batch that the run comes to has at least ``least`` samples."""
    batches = {min(batch, size)}
    if config.drop_last:
        return batch <= size and smallest_piece(batch, ranks, config.accumulate) >= least
    if config.steps is None or config.steps >= -(-size // batch):  # else the run ends before the last batch of an epoch
        batches.add(size % batch or min(batch, size))
    return all(smallest_piece(samples, ranks, config.accumulate) >= least for samples in batches)


def _trains_on_one(config: EsperConfig, grown: Grown, example: Any) -> bool:
    """Whether the host, in train(), takes a batch of one sample; leaves it as it was."""
    args, kwargs = arguments(tree_map_only(Tensor, lambda leaf: leaf[:1].clone(), example))
    with undisturbed(grown.model), untouched(grown.model), torch.no_grad():
        grown.model.train()
        try:
            with autocast(config.trainer.precision, next(grown.model.parameters()).device):
                grown.model(*args, **kwargs)
        except ValueError:  # torch: "Expected more than 1 value per channel when training"
            return False
    return True


def check_batches(config: EsperConfig, grown: Grown, bundle: Bundle, ranks: int) -> None:
    """Checks that every forward of training can compute its statistics, from its own samples alone.

    Args:
        config: of the run.
        grown: the host, its slots empty.
        bundle: the data.
        ranks: number of ranks.

    Raises:
        ConfigError: some forward would have one sample too few, or none; the text names a batch that fits.
    """
    trainer = replace(config.trainer, accumulate=forwards_of(config.trainer, bundle, ranks))
    size, batch, accumulate = len(bundle.train), trainer.batch, trainer.accumulate
    layers = [module for module in grown.model.modules() if isinstance(module, _BatchNorm)]
    if not layers or _fits(trainer, size, batch, ranks, 2):
        return
    weight = next(grown.model.parameters())
    example = bundle.example(weight.device, dtype_of(config.trainer.precision))
    if _fits(trainer, size, batch, ranks, 1) and _trains_on_one(config, grown, example):
        return
    near = sorted(range(1, size + 1), key=lambda other: (abs(other - batch), -other))
    fitting = next((other for other in near if _fits(trainer, size, other, ranks, 2)), None)
    advice = "use another normalisation" if fitting is None else f"set trainer.batch={fitting}"
    if _fits(replace(trainer, drop_last=True), size, batch, ranks, 2):
        advice += ", or trainer.drop_last=true, which leaves that batch out"
    rest = batch if config.trainer.drop_last else size % batch or min(batch, size)
    least = smallest_piece(rest, ranks, accumulate)
    which = "each batch" if rest == batch else f"the last batch of each {size} samples"
    raise ConfigError(
        f"trainer.batch = {batch}: the host has BatchNorm, and {which} has {rest}; "
        f"some forward then has {'none' if least == 0 else 'only one'} (ranks: {ranks}, trainer.accumulate: "
        f"{accumulate}), from which no statistics can be made; {advice}"
    )
