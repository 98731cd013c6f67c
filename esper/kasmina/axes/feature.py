"""The place of the feature in a module's output: finds it, reads it and puts a new feature there.

    returns                                   feature
    a tensor                                  itself
    tuple, list, mapping or dataclass         its only float tensor, else its first entry if that is a float tensor

The place is decided once, on the example, and only read during a run. Everything beside the feature passes through
unchanged, in a container of the same type (a namedtuple, a `ModelOutput` of transformers, a struct sequence of torch).
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

Place: TypeAlias = int | str | None
"""Index in a sequence, key or field of a mapping or dataclass, None for the output itself."""


def _entries(output: Any) -> list[tuple[Any, Any]]:
    """Key and value of each entry of a container, without fields that hold None; empty for anything else."""
    if isinstance(output, MutableMapping):
        return [(key, value) for key, value in output.items() if value is not None]
    if isinstance(output, list | tuple):
        return list(enumerate(output))
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        named = [(field.name, getattr(output, field.name)) for field in dataclasses.fields(output)]
        return [(name, value) for name, value in named if value is not None]
    return []


def place_of(output: Any) -> Place:
    """Returns the place of the feature in a module's output.

    Raises:
        ValueError: the output has no feature; the text says what was returned.
    """
    if isinstance(output, Tensor):
        return None
    entries = _entries(output)
    floats = [key for key, value in entries if isinstance(value, Tensor) and value.is_floating_point()]
    kind = type(output).__name__
    if not floats:
        inside = f" of {', '.join(type(value).__name__ for _, value in entries)}" if entries else ""
        raise ValueError(f"returns {kind}{inside}, need a tensor, or a container that holds a float tensor")
    if len(floats) > 1 and floats[0] != entries[0][0]:
        raise ValueError(f"returns {kind} with float tensors at {floats}; need a single one, or one that comes first")
    return floats[0]


def take(output: Any, place: Place) -> Any:
    """Returns the entry at ``place``; None if the output has no such place."""
    if place is None:
        return output
    return next((value for key, value in _entries(output) if key == place), None)


def put(output: Any, place: Place, feature: Tensor) -> Any:
    """Returns the output with ``feature`` at ``place``, in a container of the same type; other entries stay."""
    if place is None:
        return feature
    if isinstance(output, tuple):
        items = [feature if index == place else item for index, item in enumerate(output)]
        make: Any = getattr(type(output), "_make", type(output))
        return make(items)
    twin = copy.copy(output)
    if isinstance(twin, MutableMapping | list):
        twin[place] = feature  # type: ignore[index]
    else:
        object.__setattr__(twin, str(place), feature)  # works for a frozen dataclass too
    return twin


def copy_inputs(inputs: Any) -> Any:
    """Returns a model's inputs with a copy of each tensor: a model may write into what it is given."""
    return tree_map_only(Tensor, torch.clone, inputs)


def replace_tensors(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns the output with ``change`` of each tensor in nested containers in its place."""
    if isinstance(output, Tensor):
        return change(output)
    for key, value in _entries(output):
        changed = replace_tensors(value, change)
        if changed is not value:
            output = put(output, key, changed)
    return output


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yields every tensor in nested containers."""
    if isinstance(output, Tensor):
        yield output
    for _, value in _entries(output):
        yield from tensors_in(value)
