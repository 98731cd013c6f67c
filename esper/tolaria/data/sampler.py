"""Chooses the samples of each rank at each step by pure functions, so that the cursor of a run is one number.

The global batch of an optimizer step depends on (seed, step) alone. It is cut into contiguous shards, one per rank, and
each shard into as many pieces as there are forward/backward passes in a step. Every rank does the same number of
passes, even if the ragged last batch has fewer samples than there are passes: a piece without samples becomes one
sample of weight 0. So no rank is missing from a gradient reduction, and every sample still counts once.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from esper.tolaria.data.hashing import seeded_order


class BatchPlan:
    """The global batches of a run.

    Args:
        size: samples in the training part.
        batch: samples of a global batch; the last batch of an epoch has the rest.
        seed: the run's; each epoch has a permutation keyed by (seed, epoch).
        drop_last: leaves a last batch of an epoch out that would be short; others are left out in each epoch.
        group: samples that are dealt whole to one rank, neighbours in the epoch's order; `size` and `batch` are
            multiples of it.

    Raises:
        ValueError: size or batch below 1, or no whole batch where a short one is left out, or groups that are cut.
    """

    def __init__(self, size: int, batch: int, seed: int, *, drop_last: bool = False, group: int = 1) -> None:
        if size < 1 or batch < 1 or (drop_last and batch > size) or size % group or batch % group:
            raise ValueError(
                f"a batch plan needs at least one sample and a batch of one, got size={size} batch={batch} "
                f"drop_last={drop_last} group={group}"
            )
        self.size, self.batch, self.seed, self.drop_last, self.group = size, batch, seed, drop_last, group
        self._orders: dict[int, Tensor] = {}  # permutations of the latest two epochs: what reads ahead is in the next

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in a pass over the training part, including the ragged last one if it is trained."""
        return self.size // self.batch if self.drop_last else -(-self.size // self.batch)

    @property
    def samples_per_epoch(self) -> int:
        """Samples that are trained in a pass over the training part."""
        return self.steps_per_epoch * self.batch if self.drop_last else self.size

    def locate(self, step: int) -> tuple[int, int]:
        """Epoch and place in it of optimizer step ``step``, both from 0."""
        if step < 0:
            raise ValueError(f"step = {step}: must be >= 0")
        return divmod(step, self.steps_per_epoch)

    def epoch_ends(self, step: int, following: int) -> bool:
        """Whether an epoch ends between two steps that are trained one after the other (others may be left out)."""
        return self.locate(step)[0] != self.locate(following)[0]

    def epoch_order(self, epoch: int) -> Tensor:
        """The permutation of an epoch, int64 [size]."""
        return seeded_order(self.size, "epoch", self.seed, epoch)

    def indices(self, step: int) -> Tensor:
        """The global batch of a step: int64 [batch], or fewer at an epoch's end."""
        epoch, place = self.locate(step)
        if epoch not in self._orders:
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: self.epoch_order(epoch)}
        return self._orders[epoch][place * self.batch : (place + 1) * self.batch]

    def pieces(self, step: int, rank: int, world: int, accumulate: int) -> list[tuple[Tensor, Tensor]]:
        """The pieces of one rank in a step: ``accumulate`` pairs of indices and weights (see `microbatches`)."""
        indices = self.indices(step)
        if self.group == 1:
            return microbatches(shard(indices, rank, world), accumulate, spare=int(indices[0]))
        groups = torch.arange(len(indices) // self.group)
        dealt = microbatches(shard(groups, rank, world), accumulate, spare=0)
        rows = indices.view(-1, self.group)
        return [(rows[some].flatten(), weights.repeat_interleave(self.group)) for some, weights in dealt]


def bounds(size: int, index: int, count: int) -> tuple[int, int]:
    """First and past-last place of piece ``index`` when ``size`` is cut into ``count`` that differ by at most one."""
    if not 0 <= index < count:
        raise ValueError(f"piece {index} of {count}: must be 0 to {count - 1}")
    least, longer = divmod(size, count)
    first = index * least + min(index, longer)
    return first, first + least + (index < longer)


def shard(indices: Tensor, rank: int, world: int) -> Tensor:
    """A rank's contiguous share of a global batch; empty for the last ranks where there are more ranks than samples."""
    first, last = bounds(len(indices), rank, world)
    return indices[first:last]


def microbatches(shard: Tensor, accumulate: int, *, spare: int) -> list[tuple[Tensor, Tensor]]:
    """Cuts a rank's shard into exactly ``accumulate`` pieces.

    Args:
        shard: int64 [S]; S may be 0.
        accumulate: number of pieces.
        spare: sample that stands in for an empty shard, with weight 0.

    Returns:
        Pairs of indices [M] and float32 weights [M], M >= 1. Weights are 1, or 0 for the one sample of an empty piece;
        over all ranks and pieces they sum to the size of the global batch.
    """
    pieces = []
    for index in range(accumulate):
        first, last = bounds(len(shard), index, accumulate)
        if first < last:
            pieces.append((shard[first:last], torch.ones(last - first)))
        else:
            stand_in = shard[:1] if len(shard) else torch.tensor([spare])
            pieces.append((stand_in, torch.zeros(1)))
    return pieces


def eval_shards(size: int, rank: int, world: int, batch: int, group: int = 1) -> Iterator[Tensor]:
    """A rank's batches of an evaluation, int64, at most ``batch`` each; over ranks every sample comes exactly once.

    Ranks may get unequal numbers of batches, so no collective belongs inside the loop. No ``group`` of neighbours is
    cut; ``size`` and ``batch`` are multiples of it.
    """
    first, last = (group * end for end in bounds(size // group, rank, world))
    for start in range(first, last, batch):
        yield torch.arange(start, min(start + batch, last))


def draw(size: int, count: int, *key: int | str) -> Tensor:
    """``count`` different samples out of ``size``, int64; a pure function of its arguments.

    Raises:
        ValueError: ``count`` is larger than ``size``.
    """
    if not 0 <= count <= size:
        raise ValueError(f"cannot draw {count} different samples out of {size}")
    return seeded_order(size, *key)[:count]


def draw_groups(size: int, count: int, group: int, *key: int | str) -> Tensor:
    """As `draw`, of whole groups of neighbours: ``count`` samples at most, but one group at least."""
    if group == 1:
        return draw(size, min(count, size), *key)
    chosen = draw(size // group, max(1, min(count, size) // group), *key)
    return (chosen[:, None] * group + torch.arange(group)).flatten()
