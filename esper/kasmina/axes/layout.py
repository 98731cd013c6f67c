"""Finds the layout of a feature: which of its axes holds samples, which positions, which channels.

The rank alone does not say: [B, T, C], [T, B, C] and [B, C, T] have three axes each, [B, C, H, W] and [B, H, W, C]
four. So the host runs again on a varied example, in eval():

    samples     the axis of the feature that moves when the batch has another size. The batch is the first axis of the
                inputs or, for sites with three axes, the second: the one along which every output moves. Where both
                are, the one along which the values of one sample change nothing in another.
    positions   the axes that move when the inputs have another length, height or width
    channels    the axis that is left; or if the inputs have a fixed size, the axis of channels of the last layer that
                returned a feature of this shape (last for Linear and LayerNorm, second for convolutions and GroupNorm)

Whatever stays open is an error that asks for ``layout=``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NoReturn

from torch import Tensor, nn

from esper.kasmina.axes.example import Example, axes_of, perturbed, resized, sizes_to_try, tensors
from esper.kasmina.axes.forward import OUTPUT, Seen, Watch, differs, moved_axes
from esper.leyline.errors import ConfigError
from esper.leyline.topology import LAYOUTS, Topology

RANKS = {topology.ndim for topology in Topology}

_LAST = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.RNNBase, nn.MultiheadAttention, nn.RMSNorm)
_SECOND = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


class _Mixing(Enum):
    """What other values at one index of an axis of the inputs do to a feature with that axis."""

    APART = "they change that index alone"
    MIXED = "they change other indices, too"
    UNKNOWN = "they could not be changed, or changed nothing"
    NOWHERE = "no feature has the axis in its size"


@dataclass(frozen=True, slots=True)
class Change:
    """A forward with another size of one axis of the inputs."""

    axis: int
    size: int
    new: int
    example: Example
    seen: Seen


@dataclass(slots=True)
class Findings:
    """Layouts by module, and what else the forwards showed.

    Fields:
        layouts: one letter for each axis of the feature.
        lengths: by module, the changes of the inputs' sizes by which its axes of positions move.
        batch: the axis of the inputs that holds samples; None where nothing had to be found.
    """

    layouts: dict[str, str]
    lengths: dict[str, list[Change]] = field(default_factory=dict)
    batch: int | None = None


def channels_of(_name: str, module: nn.Module, feature: Tensor) -> tuple[tuple[int, ...], int] | None:
    """Shape of a layer's output and the axis of channels in it; None for modules that do not say."""
    shape = tuple(feature.shape)
    if isinstance(module, _LAST):
        return shape, len(shape) - 1
    if isinstance(module, _SECOND) and len(shape) > 2:
        return shape, 1
    return None


class LayoutFinder:
    """Finds the layouts of some modules' features.

    Args:
        watch: runs the host.
        example: a batch of its inputs.
        where: what an error calls each module, by name.
    """

    def __init__(self, watch: Watch, example: Example, where: Mapping[str, str]) -> None:
        self.watch, self.example, self.where = watch, example, dict(where)
        self.base = watch.run(example, channels_of) or Seen()

    def find(self) -> Findings:
        """Returns the layouts.

        Raises:
            ConfigError: some cannot be told; the text names the site and the argument.
        """
        if not self.where:
            return Findings({})
        change = self._vary(0)
        if change is None:
            self._ask(next(iter(self.where)), f"the example cannot be repeated with another batch size ({self._why()})")
        three = any(self._feature(name).ndim == 3 for name in self.where)
        batch = self._batch_of(change) if three else change
        found = Findings({}, {name: [] for name in self.where}, batch.axis)
        self._vary_lengths(found)
        for name in self.where:
            found.layouts[name] = self._layout(name, batch, found.lengths[name])
        return found

    def _feature(self, name: str) -> Tensor:
        return self.base.sites[name]

    def _why(self) -> str:
        return self.watch.why if tensors(self.example) else "no tensor was found in it"

    def _ask(self, name: str, why: str) -> NoReturn:
        shape = tuple(self._feature(name).shape)
        raise ConfigError(
            f"{self.where[name]} returns {shape}: {why}; say what its axes mean by layout= (host.layout of a run), "
            f"for example layout={{slot: {self._guess(name)!r}}}, one of {LAYOUTS}"
        )

    def _guess(self, name: str) -> str:
        return {2: "BC", 3: "BTC", 4: "BCHW"}[self._feature(name).ndim]

    def _vary(self, axis: int, size: int | None = None) -> Change | None:
        known = tensors(self.example)
        if size is None and (not known or axis not in axes_of(known[0][1])):
            return None
        size = known[0][1].shape[axis] if size is None else size
        for new in sizes_to_try(size):
            example = resized(self.example, axis, size, new)
            seen = self.watch.run(example)
            if seen is not None:
                return Change(axis, size, new, example, seen)
        return None

    # samples ---------------------------------------------------------------------------------------------------------

    def _batch_of(self, first: Change) -> Change:
        """The change of the inputs' axis that holds samples: the first or the second."""
        second = self._vary(1)
        if second is None or not any(self._moved(name, second) for name in self.base.sites):
            return first
        outputs = [name for name in self.base.sites if name.startswith(OUTPUT)]
        outputs = [name for name in outputs if self._moved(name, first) or self._moved(name, second)]
        by_first, by_second = (all(self._moved(name, change) for name in outputs) for change in (first, second))
        if by_first != by_second:
            return first if by_first else second
        one, two = self._mixing(first), self._mixing(second)
        if one is _Mixing.MIXED and two is _Mixing.APART:
            return second
        if one is not two and _Mixing.UNKNOWN not in (one, two):
            return first
        if one is two is _Mixing.MIXED:
            return first  # a host that mixes samples itself, whichever axis they have
        name = next(n for n in self.where if self._feature(n).ndim == 3)
        self._ask(name, "samples may be its first or its second axis: no value moved from one to another on either")

    def _moved(self, name: str, change: Change) -> tuple[int, ...]:
        return moved_axes(self.base.sites[name], change.seen.sites.get(name))

    def _mixing(self, change: Change) -> "_Mixing":
        """Whether other values at one index of the inputs' axis reach other indices of the features that have it."""
        reached = mixed = shared = False
        for at in (0, change.new - 1):
            example = perturbed(change.example, change.axis, change.new, at)
            seen = None if example is None else self.watch.run(example)
            for name, before in change.seen.sites.items():
                moved = self._moved(name, change) if name in self.base.sites else ()
                if len(moved) != 1 or before.shape[moved[0]] != change.new:
                    continue  # samples and something else share the axis, or it was resampled
                shared = True
                after = None if seen is None else seen.sites.get(name)
                if after is not None and after.shape == before.shape:
                    different = differs(before, after, moved[0])
                    reached |= different.pop(at)
                    mixed |= any(different)
        if not shared:
            return _Mixing.NOWHERE
        return _Mixing.MIXED if mixed else _Mixing.APART if reached else _Mixing.UNKNOWN

    # positions and channels ------------------------------------------------------------------------------------------

    def _vary_lengths(self, found: Findings) -> None:
        """Runs with other sizes of the inputs' other axes, and notes by which the features of sites move."""
        sizes = {(axis, tensor.shape[axis]): None for _, tensor in tensors(self.example) for axis in axes_of(tensor)}
        names = [name for name in self.where if self._feature(name).ndim > 2]
        for axis, size in [key for key in sizes if key[0] != found.batch] if names else []:
            change = self._vary(axis, size)
            for name in names:
                if change is not None and self._moved(name, change):
                    found.lengths[name].append(change)

    def _layout(self, name: str, batch: Change, lengths: list[Change]) -> str:
        feature = self._feature(name)
        moved = self._moved(name, batch)
        if len(moved) != 1 or (feature.ndim == 4 and moved[0] != 0):
            which = "no axis moves" if not moved else f"axis {' and '.join(map(str, moved))} moves"
            self._ask(name, f"{which} with the number of samples")
        letters = ["?"] * feature.ndim
        letters[moved[0]] = "B"
        rest = [axis for axis in range(feature.ndim) if axis != moved[0]]
        places = {axis for change in lengths for axis in self._moved(name, change)} & set(rest)
        channel = next(iter(set(rest) - places)) if len(places) == len(rest) - 1 else self._channel(name)
        if channel is None or channel not in rest or (channel in places and len(places) < len(rest)):
            self._ask(name, "no forward told which axis holds channels")
        for axis, letter in zip([a for a in rest if a != channel], "T" if feature.ndim == 3 else "HW", strict=False):
            letters[axis] = letter
        letters[channel] = "C"
        return "".join(letters)

    def _channel(self, name: str) -> int | None:
        """The axis of channels by the layers that return a feature of this shape: the last one in the site, or all."""
        shape = tuple(self._feature(name).shape)
        same: dict[str, Any] = {other: axis for other, (of, axis) in self.base.modules.items() if of == shape}
        inside = [axis for other, axis in same.items() if other == name or other.startswith(f"{name}." if name else "")]
        if inside:
            return int(inside[-1])
        return int(next(iter(same.values()))) if len(set(same.values())) == 1 else None
