"""A user's own batches, from which evidence is drawn: the same on every rank, and sharded here.

A `DataLoader` over a map-style dataset is read by sample, in the order of its dataset: its sampler, its workers and
its shuffling are not used, so that a look is a pure function of its key. Any other sized iterable is read once and
kept; then whole batches are drawn. Of a batch only one thing is known: the user's loss accepts it.

Samples that may depend on each other are a *cluster*: where nothing else is said, each sample of a dataset is one, and
each batch of a list.
"""

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from esper.accord.config import GateConfig
from esper.accord.evidence.plan import ProbePlan, plan_probe
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError
from esper.tolaria.data.clusters import Clusters, draw_share
from esper.tolaria.data.sampler import bounds, draw
from esper.tolaria.ranks.digest import digest_tensors


def tensors_of(batch: Any) -> list[Tensor]:
    """The tensors of a batch with at least one axis, in the batch's own order."""
    return [leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor) and leaf.ndim > 0]


def _size(batch: Any) -> int:
    """Samples in a batch; 0 if it has no tensor."""
    tensors = tensors_of(batch)
    return len(tensors[0]) if tensors else 0


CPU = torch.device("cpu")


class Batches:
    """Batches by number. A *unit* is a sample of a dataset, or a whole batch of a list.

    Args:
        source: a `DataLoader`, or any sized iterable of batches.
        name: the source's name in error texts.
        device: of the model; random numbers that the source draws there do not disturb training.
        cluster: the cluster of each unit, any value that can be hashed, in the order of the dataset or the list;
            "sample": each sample is one, in a list of batches too; None: each unit is one.

    Fields:
        sizes: samples of each unit.
        clusters: units by cluster.
        singly: whether each sample of a unit is a cluster.

    Raises:
        ConfigError: the source has no length, is empty, or a batch holds no tensor; ``cluster`` does not fit it.
    """

    def __init__(
        self,
        source: Iterable[Any],
        name: str,
        device: torch.device = CPU,
        *,
        cluster: Iterable[Hashable] | str | None = None,
    ) -> None:
        self._device = device
        self._loader: DataLoader[Any] | None = None
        indices = _indices(source)
        if indices is not None:
            assert isinstance(source, DataLoader)
            self._loader, self._units = source, indices
            self.sizes = [1] * len(indices)
        else:
            try:
                len(source)  # type: ignore[arg-type]
            except TypeError:
                raise ConfigError(
                    f"{name} = {type(source).__name__}: it has no length; pass a DataLoader over a map-style dataset "
                    "or a list of batches"
                ) from None
            with undisturbed(self._device):
                self._units = list(source)
            self.sizes = [_size(batch) for batch in self._units]
        if not self.sizes or 0 in self.sizes:
            raise ConfigError(f"{name}: {'it is empty' if not self.sizes else 'a batch without a tensor of samples'}")
        self.singly = cluster == "sample"
        self.clusters = Clusters(len(self.sizes), None if self.singly else _labels(cluster, len(self.sizes), name))

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(self.sizes)

    def plan(self, gates: GateConfig) -> ProbePlan:
        """The looks that these batches afford."""
        clusters = self.samples if self.singly else len(self.clusters)
        return plan_probe(
            self.samples, clusters, per_look=gates.probe_samples, reserve=gates.reserve, units=len(self.clusters)
        )

    def draw_units(self, samples: int, *key: int | str) -> list[int]:
        """Draws different units until they hold ``samples`` samples; a pure function of the arguments."""
        chosen, count = [], 0
        for unit in draw(len(self.sizes), len(self.sizes), *key).tolist():
            if count >= samples:
                break
            chosen.append(unit)
            count += self.sizes[unit]
        return chosen

    def draw_look(
        self, look: int, shares: int, rank: int, world: int, *key: int | str
    ) -> tuple[list[int], Tensor | None]:
        """A rank's units of a look, and the number of each sample's cluster, from 0; None: each sample is one."""
        units, places = self.clusters.members(draw_share(len(self.clusters), look, shares, rank, world, *key))
        if self.singly:
            return units.tolist(), None
        return units.tolist(), torch.repeat_interleave(places, torch.tensor(self.sizes)[units])

    def share(self, units: Sequence[int], rank: int, world: int) -> Iterator[Any]:
        """Yields a rank's batches of some units; over all ranks every unit comes exactly once."""
        first, last = bounds(len(units), rank, world)
        yield from self.batches(units[first:last])

    def batches(self, rank_units: Sequence[int]) -> Iterator[Any]:
        """Yields batches of some units, in their order."""
        if self._loader is None:
            yield from (self._units[unit] for unit in rank_units)
            return
        step = self._loader.batch_size or 64
        for start in range(0, len(rank_units), step):
            with undisturbed(self._device):  # a dataset may augment, which must not disturb training
                items = [self._loader.dataset[self._units[unit]] for unit in rank_units[start : start + step]]
                batch = self._loader.collate_fn(items)
            yield batch

    def whole(self, samples: int, *key: int | str) -> Iterator[Any]:
        """Yields batches of different units that hold about ``samples`` samples, all of them and alike on every rank.

        A short last batch is left out: batches count the same, and one sample has no variance.
        """
        units = self.draw_units(samples, *key)
        if self._loader is not None:
            step = self._loader.batch_size or 64
            units = units[: len(units) // step * step or None]
        batches, nothing = self.share(units, 0, 1), object()
        for seed in itertools.count():
            with undisturbed(self._device, seed=seed):  # a dataset may augment: alike on every rank
                batch = next(batches, nothing)
            if batch is nothing:
                return
            yield batch

    def fingerprint(self) -> str:
        """Describes the source by its size and a digest of the first and the last batch, to compare it over ranks."""
        with undisturbed(self._device, seed=0):  # a dataset may augment at random
            ends = [*self.share([0], 0, 1), *self.share([len(self.sizes) - 1], 0, 1)]
        tensors = [tensor for batch in ends for tensor in tensors_of(batch)]
        parts = [part for tensor in tensors for part in (tensor.unbind() if tensor.is_nested else [tensor])]
        named = [(str(i), part.cpu()) for i, part in enumerate(parts)]
        clusters = self.clusters.members(torch.arange(len(self.clusters)))
        by = "samples" if self.singly else f"{digest_tensors(zip(('units', 'clusters'), clusters, strict=True)):x}"
        return f"{self.samples} samples, clusters {by}, ends {digest_tensors(named):x}"


def _labels(cluster: Iterable[Hashable] | str | None, units: int, name: str) -> Tensor | None:
    if cluster is None:
        return None
    if isinstance(cluster, str):
        raise ConfigError(f"cluster = {cluster!r}: expected 'sample', or one value for each sample or batch of {name}")
    numbers: dict[Hashable, int] = {}
    values = [value.item() if isinstance(value, Tensor) else value for value in cluster]
    if len(values) != units:
        raise ConfigError(f"cluster: {len(values)} values for {units} samples or batches of {name}; give one for each")
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def _indices(source: Any) -> list[int] | None:
    """The dataset indices of a loader that can be read by sample, sorted; None for anything else."""
    if not isinstance(source, DataLoader) or isinstance(source.dataset, IterableDataset) or source.batch_size is None:
        return None
    sampler = source.sampler
    if isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler):
        return list(range(len(source.dataset)))  # type: ignore[arg-type]
    if hasattr(sampler, "indices"):  # a SubsetRandomSampler: the rest of the dataset has another use
        return sorted(int(index) for index in sampler.indices)
    return None
