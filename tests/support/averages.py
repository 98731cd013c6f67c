"""An average of weights by hand: the recurrence written out over weights that were noted after each step, by name."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


def weights_of(model: nn.Module) -> Weights:
    """The parameters by name as they are now, in float64."""
    return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}


def averaged(decay: float, start: Weights, steps: Iterable[tuple[Weights, bool]]) -> Weights:
    """``decay * average + (1 - decay) * weights`` for each step, by name.

    Args:
        decay: of the average. start: weights before the first step.
        steps: weights after each step and the tick that came of it, and whether the step was taken.
    """
    average = dict(start)
    for weights, taken in steps:
        moved = {}
        for name, value in weights.items():
            if name not in average:
                moved[name] = value  # born at that tick
            else:
                moved[name] = decay * average[name] + (1 - decay) * value if taken else average[name]
        average = moved  # what is gone is left out
    return average


def assert_averages(found: Mapping[str, Tensor], wanted: Weights, *, tolerance: float) -> None:
    """Equal names, and values within a tolerance."""
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value, rtol=tolerance, atol=tolerance, msg=name)
