"""Whether the parts of a run fit each other: what the host returns, and which blueprints fit its slots."""

from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from esper.accord.state import Terms
from esper.config.tree import EsperConfig
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.grown import HOST, Grown
from esper.kasmina.slots.sites import arguments
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError
from esper.tolaria.data.parts import Bundle
from esper.tolaria.growth.terms import check_preferred
from esper.tolaria.tasks import LabelTask
from esper.tolaria.tasks.bind import task_of
from esper.tolaria.tasks.task import read_logits
from esper.tolaria.training.precision import autocast, dtype_of


def check_output(grown: Grown, bundle: Bundle, example: Any, config: EsperConfig) -> None:
    """Checks that the task gets a loss for each sample from what the host returns; for labels also that there is a
    logit for each class of the data (or more, as with a padded vocabulary).

    Raises:
        ConfigError: it returns something else; the text has both shapes.
    """
    task, device = task_of(bundle), next(grown.model.parameters()).device
    x, y = bundle.train.fetch(torch.arange(max(2, task.group)))
    x, y = tree_map_only(torch.Tensor, lambda leaf: _placed(leaf, device, config), (x, y))
    args, kwargs = arguments(copy_inputs(example if isinstance(task, LabelTask) else x))
    with undisturbed(grown.model), evaluating(grown.model), autocast(config.trainer.precision, device):
        output = grown.model(*args, **kwargs)
    if not isinstance(task, LabelTask):
        task.check(output, y, max(2, task.group))
        return
    logits = read_logits(output, task.name)
    if isinstance(example, torch.Tensor):
        axes = list(example.shape[:1] if task.class_logits else example.shape[:2])
        if list(logits.shape[:-1]) != axes or logits.shape[-1] < bundle.classes:
            raise ConfigError(
                f"host.kind = {config.host.kind!r}: for inputs {list(example.shape)} it returns {list(logits.shape)}, "
                f"expected logits {[*axes, bundle.classes]}, one for each class of data.kind = {config.data.kind!r}; "
                "correct the host"
            )
    task.check(logits, y, 2)


def check_owners(config: EsperConfig, grown: Grown) -> None:
    """Checks that norms for clipping are those of owners.

    Raises:
        ConfigError: one is not; the text lists them.
    """
    unknown = sorted(set(config.optim.clip_norms or ()) - {HOST, *grown.slots})
    if unknown:
        owners = ", ".join([HOST, *grown.slots])
        raise ConfigError(f"optim.clip_norms: {', '.join(unknown)} is no owner; there are {owners}")


def check_blueprints(config: EsperConfig, terms: Terms) -> None:
    """Checks the blueprints that the controller prefers: see `check_preferred`."""
    check_preferred(getattr(config.controller, "blueprints", None) or (), terms)


def _placed(leaf: torch.Tensor, device: torch.device, config: EsperConfig) -> torch.Tensor:
    return leaf.to(device, dtype_of(config.trainer.precision) if leaf.is_floating_point() else None)
