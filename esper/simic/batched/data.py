"""The samples of many nets, gathered for one forward.

Shapes: L lanes, B samples of a lane.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from esper.simic.batched.recipe import Samples


class Pool:
    """One part of each net's data, in one tensor with a region for each place.

    Args:
        places: number of nets.
        dtype: number format of images; tokens keep theirs.
        device: where they lie.
    """

    def __init__(self, places: int, dtype: torch.dtype, device: torch.device) -> None:
        self.places, self.dtype, self.device = places, dtype, device
        self.sizes = [0] * places
        self._room = 0
        self._x: Tensor | None = None
        self._y: Tensor | None = None

    def put(self, place: int, part: Samples) -> None:
        """Puts a net's samples in its place."""
        size = len(part)
        x, y = part.fetch(torch.arange(size))
        x = x.to(self.device, self.dtype if x.is_floating_point() else None)
        if size > self._room or self._x is None:
            self._x, self._y = self._widened(self._x, x, size), self._widened(self._y, y, size)
            self._room = size
        assert self._y is not None
        self._x[place, :size], self._y[place, :size] = x, y.to(self.device)
        self.sizes[place] = size

    def _widened(self, before: Tensor | None, values: Tensor, room: int) -> Tensor:
        after = values.new_zeros(self.places, room, *values.shape[1:], device=self.device)
        if before is not None:
            after[:, : self._room] = before
        return after

    def gather(self, places: Tensor, indices_LB: Tensor) -> tuple[Tensor, Tensor]:
        """Samples by index.

        Args:
            places: place of each lane's net, int64 [L].
            indices_LB: indices in its part, int64 [L, B].

        Returns:
            x of [B * L] samples, in which the lanes change fastest, and y, [L, B, ...].
        """
        assert self._x is not None
        assert self._y is not None
        flat_LB = indices_LB + places[:, None] * self._room
        x = self._x.flatten(0, 1).index_select(0, flat_LB.T.flatten())
        y = self._y.flatten(0, 1).index_select(0, flat_LB.flatten())
        return x, y.unflatten(0, flat_LB.shape)


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Stacks index lists of different lengths; shorter ones repeat their first sample.

    Returns:
        Indices, int64 [L, B], and which of them count, bool [L, B]; None if all do.
    """
    sizes = [len(row) for row in rows]
    most = max(sizes)
    if min(sizes) == most:
        return torch.stack(list(rows)), None
    full = torch.stack([torch.cat([row, row[:1].expand(most - len(row))]) for row in rows])
    return full, torch.arange(most) < torch.tensor(sizes)[:, None]
