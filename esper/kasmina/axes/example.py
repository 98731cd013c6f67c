"""Variations of an example of a model's inputs: another size of an axis, other values along it.

Values stay in range and sizes only shrink where they can: an index beyond an embedding's table is an error on a CPU,
and ends the process's use of a GPU.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Example = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of a call."""


def tensors(example: Example) -> list[tuple[int, Tensor]]:
    """The tensors with axes in an example, with their index among its leaves."""
    return [(i, leaf) for i, leaf in enumerate(tree_flatten(example)[0]) if isinstance(leaf, Tensor) and leaf.ndim]


def axes_of(tensor: Tensor) -> range:
    """Its axes of one size: of a nested tensor the first."""
    return range(1 if tensor.is_nested else tensor.ndim)


def _mapped(example: Example, change: Callable[[int, Tensor], Tensor | None]) -> Example:
    """The example with some tensors replaced; None keeps one."""
    leaves, spec = tree_flatten(example)
    for index, tensor in tensors(example):
        changed = change(index, tensor)
        leaves[index] = tensor if changed is None else changed
    made: Example = tree_unflatten(leaves, spec)
    return made


def sizes_to_try(size: int) -> Iterator[int]:
    """Other sizes of an axis: half of it, one less, and more only where it cannot shrink."""
    if size >= 4:
        yield size // 2
    if size >= 3:
        yield size - 1
    else:
        yield size + 1


def resized(example: Example, axis: int, size: int, new: int) -> Example:
    """The example with ``new`` in place of ``size`` along an axis, in every tensor that has ``size`` there."""

    def change(_index: int, tensor: Tensor) -> Tensor | None:
        if axis not in axes_of(tensor) or tensor.shape[axis] != size:
            return None
        if tensor.is_nested:
            rows = sorted(tensor.unbind(), key=lambda row: -row.numel())  # the longest stays: padding goes by it
            return torch.nested.nested_tensor([rows[i % size] for i in range(new)], layout=tensor.layout)
        return tensor.index_select(axis, torch.arange(new, device=tensor.device) % size)

    return _mapped(example, change)


def perturbed(example: Example, axis: int, size: int, at: int, only: int | None = None) -> Example | None:
    """The example with other values at one index of an axis, in every tensor that has ``size`` there.

    Args:
        example: the inputs.
        axis: the axis.
        size: its size.
        at: the index along it.
        only: the index of one tensor among the leaves; None: all of them.

    Returns:
        None if nothing could be changed.
    """
    changed = False

    def change(index: int, tensor: Tensor) -> Tensor | None:
        nonlocal changed
        fits = tensor.ndim > axis and not tensor.is_nested and tensor.shape[axis] == size
        if not fits or only not in (None, index):
            return None
        values = _other_values(tensor)
        if values is None:
            return None
        changed = True
        twin = tensor.clone()
        twin.select(axis, at).copy_(values.select(axis, at))
        return twin

    made = _mapped(example, change)
    return made if changed else None


def perturbed_corner(example: Example, only: int) -> Example | None:
    """The example with another value at the last index of every axis but the first of one tensor."""

    def change(index: int, tensor: Tensor) -> Tensor | None:
        values = _other_values(tensor) if index == only and tensor.ndim > 1 and not tensor.is_nested else None
        if values is None:
            return None
        twin = tensor.clone(memory_format=torch.contiguous_format)
        twin.view(len(twin), -1)[:, -1] = values.reshape(len(twin), -1)[:, -1]
        return twin

    made = _mapped(example, change)
    return None if all(a is b for (_, a), (_, b) in zip(tensors(example), tensors(made), strict=True)) else made


def _other_values(tensor: Tensor) -> Tensor | None:
    """Values that differ from the tensor's and are in range; None if there are none to be had."""
    if tensor.dtype == torch.bool:
        return ~tensor
    if tensor.is_floating_point() or tensor.is_complex():
        stream = torch.Generator().manual_seed(1)
        noise = torch.randn(tensor.shape, generator=stream).to(tensor.device, tensor.dtype)
        return tensor + noise * (1 + tensor.abs().amax())
    low, high = tensor.min(), tensor.max()
    if low != high:
        mirrored = low + high - tensor
        return torch.where(mirrored == tensor, low, mirrored)
    if low > 0:
        return torch.zeros_like(tensor)
    if tensor.device.type == "cpu":  # 1 may be beyond a table of one row
        return torch.ones_like(tensor)
    return None
