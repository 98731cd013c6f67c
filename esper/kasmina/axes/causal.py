"""Tells whether a host is causal at a site: whether a position sees only itself and what is before it.

Other values at the last position of the inputs change nothing before it in a causal host; in another one they reach
earlier positions of some feature of the same axes, here or in a later module. Inputs are changed one by one, since a
decoder sees all of the encoder's; a host counts as not causal if each input that reaches the feature goes backward.
Where the feature has another number of positions than the input, its last eighth does not count, since tokens may have
been appended. What no forward showed counts as causal: a seed then sees less than it might, and never the future.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from esper.kasmina.axes.example import Example, axes_of, perturbed, perturbed_corner, tensors
from esper.kasmina.axes.forward import Seen, Watch
from esper.kasmina.axes.layout import Findings

_Axes = tuple[int, int, int, int]  # of samples and positions, and their sizes


def _note(wanted: set[_Axes]) -> Callable[[str, nn.Module, Tensor], dict[_Axes, Tensor] | None]:
    """Makes a note of sums by position, float64 [T, 2], for features with the wanted axes."""

    def note(_name: str, _module: nn.Module, feature: Tensor) -> dict[_Axes, Tensor] | None:
        sums = {}
        for axes in wanted if feature.ndim == 3 and feature.is_floating_point() else ():
            batch, length, samples, positions = axes
            if (feature.shape[batch], feature.shape[length]) == (samples, positions):
                rows = feature.movedim(length, 0).flatten(1).double()
                sums[axes] = torch.stack([rows.sum(1), rows.square().sum(1)], 1)
        return sums or None

    return note


def _changed(before: Seen, after: Seen, axes: _Axes) -> list[bool]:
    """By position, whether any module's feature changed there."""
    changed = [False] * axes[3]
    for name, sums in before.modules.items():
        one, two = sums.get(axes), after.modules.get(name, {}).get(axes)
        if one is not None and two is not None:
            apart = ((one - two).abs() > 1e-9 * (one.abs() + two.abs())).any(1) | (one.isnan() != two.isnan()).any(1)
            changed = [a or b for a, b in zip(changed, apart.tolist(), strict=True)]
    return changed


def find_causal(watch: Watch, example: Example, features: Mapping[str, Tensor], found: Findings) -> dict[str, bool]:
    """Returns by module whether the host is causal there.

    Args:
        watch: runs the host.
        example: a batch of its inputs.
        features: the features of modules with positions in time, on the example.
        found: their layouts, and what moves their positions.
    """
    axes: dict[str, _Axes] = {}
    for name, feature in features.items():
        batch, length = found.layouts[name].index("B"), found.layouts[name].index("T")
        axes[name] = (batch, length, feature.shape[batch], feature.shape[length])
    note = _note(set(axes.values()))
    base = watch.run(example, note) if axes else None
    if base is None:
        return dict.fromkeys(features, True)
    runs: dict[tuple[int, int, int] | int, Seen | None] = {}
    causal = {}
    for name, (batch, length, samples, positions) in axes.items():
        inputs_batch = _batch_axis(example, batch, samples) if found.batch is None else found.batch
        lengths, feature = found.lengths.get(name, ()), features[name]
        changes = [change for change in lengths if _moves(change.seen, name, length, feature)]
        drivers = {(change.axis, change.size) for change in changes} or {
            (axis, positions)
            for _, tensor in tensors(example)
            for axis in axes_of(tensor)
            if tensor.shape[axis] == positions and axis != inputs_batch
        }
        if len({axis for axis, _ in drivers}) > 1:
            drivers = set()  # rows and columns make the positions: only a corner is the last of them
        verdicts = []
        for index, tensor in tensors(example):
            for axis, size in drivers:
                if axis in axes_of(tensor) and tensor.shape[axis] == size and size > 1:
                    key = (index, axis, size)
                    if key not in runs:
                        varied = perturbed(example, axis, size, size - 1, only=index)
                        runs[key] = None if varied is None else watch.run(varied, note)
                    verdicts.append((runs[key], size == positions))
            if not drivers:
                if index not in runs:
                    varied = perturbed_corner(example, index)
                    runs[index] = None if varied is None else watch.run(varied, note)
                verdicts.append((runs[index], False))
        backward = []
        for seen, same_size in verdicts:
            changed = [] if seen is None else _changed(base, seen, axes[name])
            if any(changed) and positions > 1:
                backward.append(any(changed[: -1 if same_size else -max(1, positions // 8)]))
        causal[name] = not backward or not all(backward)
    return causal


def _batch_axis(example: Example, batch: int, samples: int) -> int:
    """The axis of samples in the inputs, for a site whose layout was given."""
    known = tensors(example)
    shape = known[0][1].shape if known else ()
    return next((axis for axis in (batch, 0, 1) if axis < len(shape) and shape[axis] == samples), 0)


def _moves(seen: Seen, name: str, axis: int, before: Tensor) -> bool:
    after = seen.sites.get(name)
    return after is not None and after.ndim == before.ndim and after.shape[axis] != before.shape[axis]
