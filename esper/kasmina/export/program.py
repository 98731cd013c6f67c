"""Writes a module by torch.export, with as many sizes of its inputs left free as torch can: batch, length, height.

    every axis    of every tensor is offered as free; torch.export keeps what the model does not fix, and its bounds
    batch alone   if that fails, or the program then computes something else on another size
    none          likewise

A size that is free has been tried: the program equals the module on one other size, and on 1 where that is said.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map_with_path, tree_unflatten

from esper.kasmina.export.record import Exported
from esper.kasmina.export.same import Inputs, check_same, run_plain
from esper.leyline.errors import ExportError

Axis = tuple[str, int]
"""Path of a tensor among the inputs, as ``[0][1]`` or ``[1]['mask']`` of (args, kwargs), and one of its axes."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FreeSize:
    """A size of the inputs that a program takes other values of.

    Fields:
        axes: tensors and axes that have this size; they change together.
        least: smallest value.
        most: largest value; None if torch knows no bound.
    """

    axes: tuple[Axis, ...]
    least: int
    most: int | None


def plain_output(value: Any) -> Any:
    """Returns the output in plain containers: mappings and dataclasses become dicts, other kinds are left out."""
    if value is None or isinstance(value, Tensor | bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        items = [plain_output(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Mapping):
        entries = dict(value)
    elif dataclasses.is_dataclass(value):
        entries = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        return None
    plain = {str(key): plain_output(item) for key, item in entries.items()}
    return {key: item for key, item in plain.items() if item is not None}


def tensors_by_path(inputs: Inputs) -> dict[str, Tensor]:
    """Returns the tensors among inputs by their path."""
    return {keystr(path): leaf for path, leaf in tree_flatten_with_path(inputs)[0] if isinstance(leaf, Tensor)}


def _resized(inputs: Inputs, axes: tuple[Axis, ...], size: int) -> Inputs:
    """Returns the inputs with ``size`` entries on these axes: the first ones, again and again."""

    def follow(path: Any, leaf: Any) -> Any:
        for place, axis in axes:
            if place == keystr(path):
                leaf = leaf.index_select(axis, torch.arange(size, device=leaf.device) % leaf.shape[axis])
        return leaf

    resized: Inputs = tree_map_with_path(follow, inputs)
    return resized


def _offers(inputs: Inputs) -> list[set[Axis]]:
    """Axes to offer as free, one set after another; torch.export takes a size of 1 for a constant."""
    tensors = tensors_by_path(inputs)
    every = {(path, axis) for path, x in tensors.items() for axis in range(x.ndim) if x.shape[axis] > 1}
    sizes = {x.shape[0] if x.ndim else 1 for x in tensors.values()}
    batch = {(path, 0) for path in tensors} if len(sizes) == 1 and sizes != {1} else set()
    offers: list[set[Axis]] = []
    for offer in (every, batch, set[Axis]()):
        if offer not in offers:
            offers.append(offer)
    return offers


def _free_sizes(program: torch.export.ExportedProgram, example: Inputs) -> list[FreeSize]:
    """Returns the sizes that a program leaves free; equal ones on one axis of several tensors are told as one.

    Raises:
        ExportError: a size is a formula of others.
    """
    names = tree_unflatten(list(program.graph_signature.user_inputs), program.call_spec.in_spec)
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    tensors = tensors_by_path(example)
    axes: dict[tuple[int, int], list[Axis]] = {}
    most: dict[tuple[int, int], list[int]] = {}
    for path, name in tree_flatten_with_path(names)[0]:
        value = values.get(name) if isinstance(name, str) else None
        for axis, size in enumerate(value.shape if isinstance(value, Tensor) else ()):
            if not isinstance(size, torch.SymInt) or size.node.expr.is_Integer:  # a number: the model fixes it
                continue
            if not size.node.expr.is_Symbol:
                raise ExportError(f"the size of axis {axis} of input {keystr(path)} is {size}")
            together = (axis, tensors[keystr(path)].shape[axis])
            axes.setdefault(together, []).append((keystr(path), axis))
            bounds = program.range_constraints.get(size.node.expr)
            if bounds is not None and bounds.upper.is_Integer:
                most.setdefault(together, []).append(int(bounds.upper))
    return [
        FreeSize(axes=tuple(places), least=2, most=min(most[key]) if key in most else None)
        for key, places in axes.items()
    ]


def _tried(module: nn.Module, loaded: nn.Module, example: Inputs, free: FreeSize) -> FreeSize:
    """Tries a size on the program and on the module; returns it with the smallest value that is known to work.

    Raises:
        Exception: the two differ on another size, or none but the example's works.
    """

    def same_at(size: int) -> None:
        other = _resized(example, free.axes, size)
        check_same(plain_output(run_plain(module, other)), run_plain(loaded, other), exact=False)

    (path, axis), *_ = free.axes
    size = tensors_by_path(example)[path].shape[axis]
    same_at(size + 1 if free.most is None or size < free.most else size - 1)
    try:
        same_at(1)
    except Exception:  # the model itself may need two, as a kernel of two does
        return free
    return dataclasses.replace(free, least=1)


def _export(module: nn.Module, exported: Exported, path: Path, offer: set[Axis]) -> list[FreeSize]:
    args, kwargs = exported.example
    shapes: Any = torch.export.ShapesCollection()
    tensors = tensors_by_path(exported.example)
    for place in {place for place, _ in offer}:
        shapes[tensors[place]] = {axis: torch.export.Dim.AUTO for where, axis in offer if where == place}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.export warns about its own internals
        handle = module.register_forward_hook(lambda _module, _args, output: plain_output(output))
        try:
            program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes if offer else None)
        finally:
            handle.remove()
        torch.export.save(program, path)
        loaded = torch.export.load(path).module()
        check_same(exported.output, run_plain(loaded, exported.example), exact=False)
        return [_tried(module, loaded, exported.example, free) for free in _free_sizes(program, exported.example)]


def write_program(module: nn.Module, exported: Exported, path: Path) -> list[FreeSize]:
    """Writes a module by torch.export and reads it back; returns the sizes that it leaves free.

    Args:
        module: a plain module in eval().
        exported: its record; example and output are on the module's device.
        path: the file.

    Raises:
        Exception: any error of torch.export; or ExportError if the program computes something else.
    """
    *attempts, last = _offers(exported.example)
    for offer in attempts:
        try:
            return _export(module, exported, path, offer)
        except Exception:  # torch.export fails in as many ways as models have; fewer free sizes may do
            continue
    return _export(module, exported, path, last)
