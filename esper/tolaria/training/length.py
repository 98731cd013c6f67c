"""How long a run is: its batches, and what becomes of one that is longer than when its checkpoint was saved."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from esper.accord.state import RunState
from esper.leyline.errors import ConfigError
from esper.leyline.events import RunExtended
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import BatchPlan
from esper.tolaria.growth.config import OptimConfig
from esper.tolaria.growth.policy import lr_shape
from esper.tolaria.lockstep.narrate import axes_of
from esper.tolaria.tasks.bind import task_of
from esper.tolaria.training.config import TrainerConfig


def plan_batches(config: TrainerConfig, bundle: Bundle, seed: int) -> BatchPlan:
    """The global batches of a run.

    Raises:
        ConfigError: `trainer.drop_last` would leave everything out, or a batch would cut a group of the task.
    """
    size, group = len(bundle.train), task_of(bundle).group
    if config.batch % group:
        near = max(config.batch // group, 1) * group
        raise ConfigError(
            f"trainer.batch = {config.batch}: the task deals groups of {group} samples whole; set trainer.batch={near}"
        )
    if config.drop_last and config.batch > size:
        raise ConfigError(
            f"trainer.batch = {config.batch}: trainer.drop_last leaves out each batch, since there are {size} training "
            f"samples; set trainer.batch={size} or lower, or trainer.drop_last=false"
        )
    return BatchPlan(size, config.batch, seed, drop_last=config.drop_last, group=group)


def forwards_of(config: TrainerConfig, bundle: Bundle, ranks: int) -> int:
    """Forward passes of an optimizer step on each rank, by `trainer.accumulate` and `trainer.max_tokens`.

    Raises:
        ConfigError: the data are no tokens, or one sample has more than `trainer.max_tokens`.
    """
    if config.max_tokens is None:
        return config.accumulate
    x = next(leaf for leaf in tree_leaves(bundle.train.fetch(torch.arange(1))[0]) if isinstance(leaf, torch.Tensor))
    where = f"trainer.max_tokens = {config.max_tokens}"
    if x.is_floating_point():
        raise ConfigError(f"{where}: data={bundle.name} gives numbers and no tokens; set trainer.accumulate instead")
    if x[0].numel() > config.max_tokens:
        raise ConfigError(f"{where}: a sample has {x[0].numel()} tokens; set trainer.max_tokens={x[0].numel()} or more")
    most = config.max_tokens // x[0].numel()
    return max(config.accumulate, math.ceil(math.ceil(config.batch / ranks) / most))


def find_extension(
    state: RunState,
    changes: Mapping[str, tuple[Any, Any]],
    trainer: TrainerConfig,
    optim: OptimConfig,
    plan: BatchPlan,
) -> RunExtended | None:
    """Returns the event of a run that has become longer; None if it has not.

    Args:
        state: of the checkpoint.
        changes: settings that differ from those of the checkpoint, as (before, after) by dotted path.
        trainer: settings of the run now.
        optim: settings of its optimizer.
        plan: of batches.
    """
    was = {name: changes[f"trainer.{name}"][0] for name in ("steps", "epochs") if f"trainer.{name}" in changes}
    if not was:
        return None
    before, after = (c.total_steps(plan.steps_per_epoch) for c in (replace(trainer, **was), trainer))
    rates = [optim.lr * lr_shape(optim, state.step, total) for total in (before, after)]
    return RunExtended(
        **axes_of(state),
        before=before,
        after=after,
        schedule=optim.schedule,
        lr_before=rates[0],
        lr_after=rates[1],
    )
