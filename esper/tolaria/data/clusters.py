"""Clusters of a probe: samples that may depend on each other, as windows of one document or images of one patient.

A cluster is never split: a look draws it whole, and one rank measures all of it. Where no clusters are known, each
sample is its own.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from esper.leyline.errors import DataError
from esper.tolaria.data.hashing import hashed_order, seeded_order
from esper.tolaria.data.sampler import bounds


def number_labels(names: Sequence[str]) -> Tensor:
    """Numbers names of clusters in the order in which they first come, int64 [N]."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in names], dtype=torch.int64)


def deal_whole(labels: Tensor, held: Mapping[str, int], split_seed: int, what: str) -> dict[str, Tensor]:
    """Deals whole clusters to the ``held`` parts, and the rest to "train".

    Each part takes clusters, in an order that ``split_seed`` decides, until it has its samples: so it may have more of
    them than it asks for, by less than its last cluster.

    Args:
        labels: cluster of each sample, any int64 [N].
        held: samples that each part but "train" has at least.
        split_seed: decides the order.
        what: source of the samples, for an error.

    Returns:
        Indices of the samples of each part, int64.

    Raises:
        DataError: there are too few clusters for the requested sizes.
    """
    clusters = Clusters(len(labels), labels)
    order, place, dealt = hashed_order(len(clusters), "split", split_seed), 0, {}
    sizes = clusters.sizes[order]
    for name, wanted in held.items():
        after = place + int((sizes[place:].cumsum(0) < wanted).sum()) + 1
        dealt[name] = clusters.members(order[place:after])[0]
        place = after
    dealt["train"] = clusters.members(order[place:])[0]
    short = [name for name, wanted in {**held, "train": 2}.items() if len(dealt[name]) < wanted]
    if short:
        raise DataError(
            f"{what}: {len(labels)} samples in {len(clusters)} clusters, which are dealt whole, leave too few for "
            f"{' and '.join(short)} after {dict(held)}; make those parts smaller, or bring more clusters"
        )
    return dealt


def draw_share(size: int, look: int, shares: int, rank: int, world: int, *key: int | str) -> Tensor:
    """A rank's part of a look, int64: places out of 0 .. size-1; over ranks and looks each comes exactly once.

    Args:
        size: things to draw from, which are never split.
        look: number of the look, from 1; looks of one key share nothing.
        shares: equal shares into which the things are cut.
        rank: this rank.
        world: number of ranks.
        key: identifies the permutation.
    """
    first, last = bounds(size, look - 1, shares)
    mine, beyond = bounds(last - first, rank, world)
    return seeded_order(size, *key)[first + mine : first + beyond]


class Clusters:
    """The clusters of a part.

    Args:
        size: samples of the part.
        labels: cluster of each sample, any int64 [size]; None: each sample is its own.
    """

    def __init__(self, size: int, labels: Tensor | None = None) -> None:
        self._order, self._starts = torch.arange(size), torch.arange(size + 1)
        if labels is not None:
            if labels.shape != (size,):
                raise ValueError(f"labels of clusters {list(labels.shape)}: need one for each of {size} samples")
            _, numbers, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
            self._order = torch.argsort(numbers, stable=True)
            self._starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def sizes(self) -> Tensor:
        """Samples of each cluster, int64 [K]."""
        return self._starts.diff()

    def members(self, clusters: Tensor) -> tuple[Tensor, Tensor]:
        """The samples of some clusters.

        Args:
            clusters: int64 [K].

        Returns:
            Indices of the samples, int64 [N], and for each the place of its cluster in ``clusters``, int64 [N].
        """
        first, sizes = self._starts[clusters], self._starts[clusters + 1] - self._starts[clusters]
        places = torch.repeat_interleave(torch.arange(len(clusters)), sizes)
        within = torch.arange(len(places)) - (sizes.cumsum(0) - sizes)[places]
        return self._order[first[places] + within], places
