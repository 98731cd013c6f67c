"""Targets with something beside them: a weight of the sample, or a second target that is mixed in."""

from typing import Any, NamedTuple

from torch import Tensor


class Weighted(NamedTuple):
    """A target, and how much its sample counts, [B]; the loss that is reported and judged is weighted, too."""

    target: Any
    weight: Tensor


class Mixed(NamedTuple):
    """Two targets, and the share of the first, [B]: of samples that were mixed in training."""

    first: Any
    second: Any
    share: Tensor
