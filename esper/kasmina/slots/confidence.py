"""The class logits that CONFIDENCE reads: the output, in eval(), of the network without the seeds that ask for them.

    with confident(grown, x):
        output = grown.model(x)

Training, evaluation and probes all use this file, so that a seed is joined by one rule. The extra forward runs only
while a slot asks for logits. It has no gradient and leaves no trace: flags, statistics and random streams stay.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import undisturbed


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval() under no_grad; afterwards every module has its old training flag."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in flags:
            module.training = training


def class_logits(grown: Grown, *args: Any, **kwargs: Any) -> Tensor | None:
    """Returns the model's output on these inputs without the seeds that ask for class logits; None if none asks."""
    asking = [slot for slot, holder in grown.slots.items() if holder.asks_logits]
    if not asking:
        return None
    args, kwargs = copy_inputs((args, kwargs))
    without = dict.fromkeys(asking, 0.0)
    with evaluating(grown.model), undisturbed(grown.model), grown.override(without):
        output: Tensor = grown.model(*args, **kwargs)
    return output


@contextlib.contextmanager
def confident(grown: Grown, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Within the block the slots that ask for class logits have them; if no slot asks, nothing happens.

    Args:
        grown: the model.
        args: positional inputs of the forward to come.
        kwargs: keyword inputs of that forward.

    Raises:
        ConfigError: raised by that forward if the model's output is not class logits [B, K >= 2].
    """
    with grown.logits(class_logits(grown, *args, **kwargs)):
        yield
