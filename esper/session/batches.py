"""Evidence from the user's own loss on the user's own batches, which are the same on every rank and sharded here.

A `DataLoader` over a map-style dataset is read by sample, in the order of its dataset: its sampler, its workers and
its shuffling are not used, so that a look is a pure function of its key. Any other sized iterable is read once and
kept; then whole batches are drawn. Of a batch only one thing is known: the user's loss accepts it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from esper.accord.config import GateConfig
from esper.accord.lifecycle import ProbeRequest
from esper.kasmina.attribution.coalitions import Plan
from esper.kasmina.attribution.prefixes import How
from esper.kasmina.attribution.probe import difference_sums
from esper.kasmina.attribution.statistics import Alphas, Statistics, take_statistics
from esper.kasmina.attribution.worth import Sums, differences
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError
from esper.tolaria.data.sampler import bounds, draw
from esper.tolaria.lockstep.measure import sample_sums
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.ranks.world import World

# (stand-in for the model, batch) -> per-sample loss [B], and correctness [B] or None
Judge = Callable[[Callable[..., Any], Any], tuple[Tensor, Tensor | None]]


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

    Fields:
        sizes: samples of each unit.

    Raises:
        ConfigError: the source has no length, is empty, or a batch holds no tensor.
    """

    def __init__(self, source: Iterable[Any], name: str, device: torch.device = CPU) -> None:
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

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(self.sizes)

    def draw_units(self, samples: int, *key: int | str) -> list[int]:
        """Draws different units until they hold ``samples`` samples; a pure function of the arguments."""
        chosen, count = [], 0
        for unit in draw(len(self.sizes), len(self.sizes), *key).tolist():
            if count >= samples:
                break
            chosen.append(unit)
            count += self.sizes[unit]
        return chosen

    def share(self, units: Sequence[int], rank: int, world: int) -> Iterator[Any]:
        """Yields a rank's batches of some units; over all ranks every unit comes exactly once."""
        first, last = bounds(len(units), rank, world)
        rank_units = units[first:last]
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
        return f"{self.samples} samples, ends {digest_tensors(named):x}"


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


class BatchEvaluator:
    """Measures a grown model by a user's loss.

    Args:
        grown: model and slots.
        world: this rank's place among the ranks, which decides its share.
        judge: computes the per-sample loss of a batch; None if the user gave no loss.
        model: the model that the loss gets.
        probe: the batches that evidence is drawn from; None without them.
        validation: the batches that are held out; None without them.
        statistics: the batches from which running statistics are taken anew; None for those of ``probe``.
        seed: the run's seed.
    """

    def __init__(
        self,
        grown: Grown,
        world: World,
        judge: Judge | None,
        model: Callable[..., Any],
        *,
        probe: Batches | None,
        validation: Batches | None,
        statistics: Batches | None = None,
        seed: int,
    ) -> None:
        self.grown, self.world, self.judge, self.model = grown, world, judge, model
        self.probe, self.validation, self.seed = probe, validation, seed
        self.statistics = statistics or probe

    def _losses(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Loss and correctness of each sample [B], in float64; correctness 0 if the loss returns none."""
        assert self.judge is not None
        with undisturbed(self.world.device):
            loss, correct = self.judge(self.model, copy_inputs(batch))
        return loss.double(), torch.zeros_like(loss).double() if correct is None else correct.double()

    def _take_statistics(self, arms: Sequence[Alphas], samples: int, *key: int | str) -> list[Statistics]:
        """Running statistics of each arm, the same on every rank; empty where the model takes none in training."""
        part, model = self.statistics, self.grown.model
        if part is None or not model.training:  # who trains in eval() keeps statistics as they are
            return [Statistics([]) for _ in arms]
        return take_statistics(self.grown, arms, part.whole(samples, "statistics", self.seed, *key), self._losses)

    def validation_sums(self, statistics: int = 0) -> dict[str, float]:
        """`sample_sums` of this rank's share of the validation part; empty without one.

        Args:
            statistics: samples from which running statistics are taken anew for it; 0: the model's own.
        """
        part = self.validation
        if part is None or self.judge is None:
            return {}
        own = [Statistics([])] if not statistics else self._take_statistics([{}], statistics, "validation")
        batches = part.share(range(len(part.sizes)), self.world.rank, self.world.size)
        with evaluating(self.grown.model), own[0].applied():
            return sample_sums(map(self._losses, batches))

    def birth_sums(self, slot: str, generation: int, gates: GateConfig) -> tuple[dict[str, float], ...]:
        """`sample_sums` at alpha 0 and at alpha 1 of probe batches that (seed, slot, generation) name; empty without.

        Every rank measures all of them.
        """
        part, sums = self.probe, []
        if part is None or self.judge is None:
            return ()
        units = part.draw_units(gates.probe_samples, "birth", self.seed, slot, generation)
        for alpha in (0.0, 1.0):
            with evaluating(self.grown.model), self.grown.override({slot: alpha}):
                sums.append(sample_sums(map(self._losses, part.share(units, 0, 1))))
        return tuple(sums)

    def probe_sums(self, slot: str, request: ProbeRequest, gates: GateConfig) -> dict[str, float]:
        """Paired evidence on this rank's share of the batches that the request draws; empty without a probe.

        These are the `difference_sums` of d = loss at alpha 0 minus loss at ``request.alpha``, in nats per sample. Both
        losses see the same samples and the same random numbers, each under running statistics of its own.
        """
        part = self.probe
        if part is None or self.judge is None:
            return {}
        units = part.draw_units(gates.probe_samples, "probe", self.seed, slot, request.draw)
        batches = part.share(units, self.world.rank, self.world.size)
        arms: list[Alphas] = [{slot: 0.0}, {slot: request.alpha}]
        taken = self._take_statistics(arms, gates.statistics_samples, slot, request.draw)
        with evaluating(self.grown.model):
            return difference_sums(self._difference(batch, arms, taken) for batch in batches)

    def worth_sums(self, plan: Plan, gates: GateConfig, tick: int) -> Sums | None:
        """What the plan's seeds are worth, by full forwards on this rank's share of validation batches that the tick
        names; None without a validation part."""
        part = self.validation
        if part is None or self.judge is None:
            return None
        units = part.draw_units(gates.probe_samples, "worth", self.seed, tick)
        arms = [plan.alphas(coalition) for coalition in plan.coalitions]
        taken = self._take_statistics(arms, gates.statistics_samples, "worth", tick)
        samples, total = 0, torch.zeros(len(plan.quantities), 4, dtype=torch.float64)
        with evaluating(self.grown.model):
            for batch in part.share(units, self.world.rank, self.world.size):
                values = []
                for alphas, own in zip(arms, taken, strict=True):
                    with self.grown.override(alphas), own.applied():
                        loss, correct = self._losses(batch)
                        values.append(torch.stack([-loss, correct]))
                d = differences(plan, torch.stack(values))
                total = total.to(d.device) + torch.stack([d.sum(2), (d * d).sum(2)], 2).flatten(1)
                samples += d.shape[2]
        moments = tuple((a, b, c, e) for a, b, c, e in total.tolist())
        return Sums(plan, samples, len(arms), moments, None, How.FULL, ())

    def _difference(self, batch: Any, arms: Sequence[Alphas], statistics: Sequence[Statistics]) -> Tensor:
        """Loss of each sample in the first arm minus that in the second; [B]."""
        losses = []
        for alphas, own in zip(arms, statistics, strict=True):
            with self.grown.override(alphas), own.applied():
                losses.append(self._losses(batch)[0])
        return losses[0] - losses[1]
