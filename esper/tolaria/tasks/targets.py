"""Targets with something beside them: a weight of the sample, or a second target that is mixed in."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils._pytree import tree_leaves


class Weighted(NamedTuple):
    """A target, and how much its sample counts, [B]; the loss that is reported and judged is weighted, too."""

    target: Any
    weight: Tensor


class Mixed(NamedTuple):
    """Two targets, and the share of the first, [B]: of samples that were mixed in training."""

    first: Any
    second: Any
    share: Tensor


def targets_in(targets: Iterable[Any]) -> Iterator[Tensor]:
    """Every tensor of some targets."""
    for target in targets:
        yield from (leaf for leaf in tree_leaves(target) if isinstance(leaf, Tensor))
