"""The weights of many nets, their moments, and what is counted for each, in flat tensors.

A *block* is one owner's part in one shape: the host, a blueprint in a slot, a gate in a slot. It has a row for each net
that holds such a part, and no row for any other: what is not there cannot be computed, nor multiplied by zero. Blocks
lie behind each other in one flat tensor, so that a step's gradient, judgement and update are a handful of operators
whatever the number of nets.

Shapes: S numbers in all, R rows, T tensors over all rows, P numbers of a row.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.kasmina.slots.grown import HOST

GATE = "(gate)"  # stands in a key where a blueprint's name would
Key = tuple[str, str]  # owner (host or slot id); blueprint, gate, or once more the host
HOST_KEY: Key = (HOST, HOST)
Floats = npt.NDArray[np.float64]

HEALTH_COUNTS = (
    *("vanishing", "exploding", "health_steps", "nans", "infs", "moved", "moved_steps"),
    *("numbers", "update_rms", "update_steps"),
)
COUNTS = ("norm", "norm_steps", "nonfinite", *HEALTH_COUNTS)


@dataclass(slots=True)
class Block:
    """Rows of one shape.

    Fields:
        shapes: of the tensors of a row, by name.
        nets: place of each row's net.
        theta: weights, [n, P].
        first: first moments, or momentum, [n, P].
        second: second moments, [n, P].
        steps: updates of each row, [n].
        counts: `COUNTS` of each row since its net's last tick, [n, 13].
        offset: row of the first one, among all rows.
    """

    shapes: dict[str, tuple[int, ...]]
    nets: list[int]
    theta: Tensor
    first: Tensor
    second: Tensor
    steps: npt.NDArray[np.int64]
    counts: Floats
    offset: int = 0
    sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sizes = [math.prod(shape) for shape in self.shapes.values()]

    def unpack(self, rows_LP: Tensor) -> dict[str, Tensor]:
        """Tensors by name, each [L, *shape], of so many rows."""
        if not self.shapes:
            return {}
        parts = rows_LP.split(self.sizes, 1)
        return {
            name: part.reshape(len(rows_LP), *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


class Weights:
    """All weights of the nets.

    Args:
        dtype: their number format.
        device: where they lie.

    Fields:
        blocks: by key; one without rows is not there.
        flat, first, second: weights and moments of all blocks, [S].
        steps, counts: of all rows.
        tensor_ends: where each tensor begins and ends in ``flat``, int64 [T + 1].
        tensor_sizes: float64 [T].
        tensor_rows: row that each tensor belongs to, int64 [T].
        number_rows: row that each number belongs to, int64 [S].
        matrices: whether a number belongs to a tensor of several axes, bool [S].
        nets: net of each row.
        owners: for each row the row that stands for its owner: its own, or for a gate the seed's.
        keys: key of each row.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.blocks: dict[Key, Block] = {}
        self._dirty = True
        self._layouts: dict[tuple[tuple[Key, int], ...], tuple[Tensor, ...]] = {}
        self.settle()

    def has(self, key: Key, net: int) -> bool:
        """Whether a net has such a part."""
        return key in self.blocks and net in self.blocks[key].nets

    def add(self, key: Key, net: int, tensors: Mapping[str, Tensor]) -> None:
        """Adds a net's part; its moments begin at zero."""
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        parts = [tensor.detach().to(self.device, self.dtype).reshape(1, -1) for tensor in tensors.values()]
        row = torch.cat(parts, 1) if parts else torch.zeros(1, 0, dtype=self.dtype, device=self.device)
        zeros = torch.zeros_like(row)
        steps, counts = np.zeros(1, dtype=np.int64), np.zeros((1, len(COUNTS)))
        block = self.blocks.get(key)
        self._dirty = True
        if block is None:
            self.blocks[key] = Block(shapes, [net], row, zeros, zeros.clone(), steps, counts)
            return
        if block.shapes != shapes or net in block.nets:
            raise ValueError(f"net {net} has another part {key}, or has it already")
        block.nets.append(net)
        block.theta, block.first = torch.cat([block.theta, row]), torch.cat([block.first, zeros])
        block.second = torch.cat([block.second, zeros])
        block.steps, block.counts = np.concatenate([block.steps, steps]), np.concatenate([block.counts, counts])

    def remove(self, key: Key, net: int) -> None:
        """Removes a net's part with its moments."""
        block = self.blocks[key]
        keep = [row for row, other in enumerate(block.nets) if other != net]
        self._dirty = True
        if not keep:
            del self.blocks[key]
            return
        block.nets = [block.nets[row] for row in keep]
        rows = torch.tensor(keep, device=self.device)
        block.theta, block.first, block.second = block.theta[rows], block.first[rows], block.second[rows]
        block.steps, block.counts = block.steps[keep], block.counts[keep]

    def clear(self, net: int) -> None:
        """Removes everything of a net."""
        for key in [key for key, block in self.blocks.items() if net in block.nets]:
            self.remove(key, net)

    def settle(self) -> None:
        """Puts the blocks behind each other again after rows came or went."""
        if not self._dirty:
            return
        blocks = self.blocks.values()
        empty = [torch.zeros(0, dtype=self.dtype, device=self.device)]
        self.flat = torch.cat([block.theta.reshape(-1) for block in blocks] or empty)
        self.first = torch.cat([block.first.reshape(-1) for block in blocks] or empty)
        self.second = torch.cat([block.second.reshape(-1) for block in blocks] or empty)
        self.steps = np.concatenate([block.steps for block in blocks] or [np.zeros(0, dtype=np.int64)])
        self.counts = np.concatenate([block.counts for block in blocks] or [np.zeros((0, len(COUNTS)))])
        self.nets = np.array([net for block in blocks for net in block.nets], dtype=np.int64)
        self.keys = [key for key, block in self.blocks.items() for _ in block.nets]
        at = row = 0
        for block in blocks:
            many, size = len(block.nets), sum(block.sizes)
            block.theta, block.first, block.second = (
                flat[at : at + many * size].view(many, size) for flat in (self.flat, self.first, self.second)
            )
            block.steps, block.counts, block.offset = self.steps[row : row + many], self.counts[row : row + many], row
            at, row = at + many * size, row + many
        self.owners = np.array([self._owner(row) for row in range(len(self.keys))], dtype=np.int64)
        self._lay_out()
        self._dirty = False

    def _owner(self, row: int) -> int:
        owner, part = self.keys[row]
        if part != GATE:
            return row
        return next(
            self.row(key, int(self.nets[row]))
            for key, block in self.blocks.items()
            if key[0] == owner and key[1] != GATE and self.nets[row] in block.nets
        )

    def row(self, key: Key, net: int) -> int:
        """Number of a net's row of this kind, among all rows."""
        block = self.blocks[key]
        return block.offset + block.nets.index(net)

    def _lay_out(self) -> None:
        sizes, rows, matrices = [], [], []
        for block in self.blocks.values():
            for row in range(len(block.nets)):
                sizes += block.sizes
                rows += [block.offset + row] * len(block.sizes)
                matrices += [len(shape) > 1 for shape in block.shapes.values()]
        sizes_T, rows_T = (torch.tensor(values, dtype=torch.int64, device=self.device) for values in (sizes, rows))
        matrices_T = torch.tensor(matrices, dtype=torch.bool, device=self.device)
        self.tensor_ends = torch.cat([sizes_T.new_zeros(1), sizes_T.cumsum(0)])
        self.tensor_sizes, self.tensor_rows = sizes_T.double(), rows_T
        self.number_rows = rows_T.repeat_interleave(sizes_T)
        self.matrices = matrices_T.repeat_interleave(sizes_T)

    def named(self, net: int) -> dict[Key, dict[str, Tensor]]:
        """The weights of one net by key and name, as views."""
        self.settle()
        return {key: self._of(block, block.theta, net) for key, block in self.blocks.items() if net in block.nets}

    @staticmethod
    def _of(block: Block, values: Tensor, net: int) -> dict[str, Tensor]:
        at = block.nets.index(net)
        return {name: tensor[0] for name, tensor in block.unpack(values[at : at + 1]).items()}

    def write(
        self, key: Key, net: int, theta: Sequence[Tensor], first: Sequence[Tensor], second: Sequence[Tensor], steps: int
    ) -> None:
        """Overwrites a net's part, its moments and its number of updates; tensors in the order of the names."""
        self.settle()
        block = self.blocks[key]
        at = block.nets.index(net)
        for place, tensors in ((block.theta, theta), (block.first, first), (block.second, second)):
            if tensors:
                place[at] = torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).to(place)
        block.steps[at] = steps
