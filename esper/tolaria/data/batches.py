"""Batches: which part is the model's input, which the target, and which samples of it are sound."""

import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from esper.leyline.errors import ConfigError, DataError, one_line

TARGETS = ("labels", "label", "target", "targets", "y")


def split_batch(batch: Any, who: str) -> tuple[Any, Any]:
    """The model's inputs and the target of a batch: (x, y), (x1, x2, ..., y), or a mapping with ``labels``.

    Inputs that are a tensor are the model's one argument, a tuple its arguments, a dict its keywords.

    Args:
        batch: what a collate function returned.
        who: asks for it, for an error.

    Raises:
        ConfigError: the batch is none of these.
    """
    if isinstance(batch, Mapping):
        target = next((name for name in TARGETS if name in batch), None)
        if target is None:
            raise ConfigError(
                f"{who}: the batch has {', '.join(map(str, batch))}, and no target under one of {', '.join(TARGETS)}; "
                "name it so, or override Task.split"
            )
        return {name: value for name, value in batch.items() if name != target}, batch[target]
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        *inputs, last = batch
        return inputs[0] if len(inputs) == 1 else tuple(inputs), last
    raise ConfigError(
        f"{who}: a batch is {type(batch).__name__}, expected (inputs, target) or a mapping with a target under labels; "
        "correct the collate function, or override Task.split"
    )


def refuse_other_shapes(error: Exception, x: Any, example: Any) -> None:
    """Says which inputs a host has failed on, where they have other shapes than those that it was tried with.

    Args:
        error: what the host raised.
        x: its inputs.
        example: those that it was tried with.

    Raises:
        DataError: their shapes differ, the number of samples aside.
    """
    got, tried = ([list(leaf.shape) for leaf in tree_leaves(one) if isinstance(leaf, Tensor)] for one in (x, example))
    if [shape[1:] for shape in got] == [shape[1:] for shape in tried]:
        return
    frame = traceback.extract_tb(error.__traceback__)[-1]  # perhaps a line of the user's own
    raise DataError(
        f"data: the host fails on inputs {', '.join(map(str, got))}, and was tried with {', '.join(map(str, tried))}: "
        f"{one_line(error)} ({Path(frame.filename).name}, line {frame.lineno}); correct the collate function, or the "
        "host if it is to take such"
    ) from error


def finite_samples(x: Any, samples: int) -> Tensor:
    """Which samples of some inputs are finite, bool [samples]; tensors without a row for each do not speak."""
    finite = torch.ones(samples, dtype=torch.bool)
    for leaf in tree_leaves(x):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.shape[:1] == (samples,):
            finite &= torch.isfinite(leaf).reshape(samples, -1).all(1)
    return finite


def keep_samples(batch: Any, kept: Tensor) -> Any:
    """Some samples of a batch; tensors without a row for each sample stay."""

    def keep(leaf: Tensor) -> Tensor:
        return leaf[kept] if leaf.shape[:1] == kept.shape else leaf

    return tree_map_only(Tensor, keep, batch)
