"""Where a seed is built that is only counted: its FLOPs, the memory it needs.

On the meta device nothing is allocated, but torch runs Python for each operator there. Small seeds of esper's own are
built on the CPU instead, which is many times faster and counts the same; every start of a run counts dozens of them.
What others register may have kernels for other devices alone, so it is not run on one.
"""

import math

import torch

from esper.kasmina.blueprints.entry import Blueprint

SMALL = 2**18
"""Elements of weights and feature up to which a seed is counted on the CPU: a MiB in float32."""


def place_to_count(entry: Blueprint, dim: int, shape: tuple[int, ...]) -> torch.device:
    """Returns the device on which to build a seed in order to count it.

    Args:
        entry: its blueprint.
        dim: channels C of the feature.
        shape: shape of one sample's feature, without the batch axis.
    """
    elements = entry.parameters(dim, **entry.arguments) + math.prod(shape)
    ours = entry.factory.__module__.startswith(f"{__package__}.")
    return torch.device("cpu" if ours and elements <= SMALL else "meta")
