"""Evaluates a network: validation, test, and the paired probe of a seed. No mutation, no collective, no gradient.

Every function returns sums over this rank's share of the samples. They travel in the observe vector and are added up
there, so a mean and its standard error do not depend on how samples were sharded.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from esper.accord.config import GateConfig
from esper.accord.evidence.plan import plan_probe
from esper.accord.lifecycle import ProbeRequest
from esper.accord.state import RunState
from esper.kasmina.attribution.coalitions import Plan
from esper.kasmina.attribution.probe import paired_sums
from esper.kasmina.attribution.statistics import take_statistics
from esper.kasmina.attribution.worth import Sums, attribute
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.slots.confidence import confident, evaluating
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import arguments
from esper.leyline.plain import digest62
from esper.tolaria.data.batches import finite_samples, keep_samples, refuse_other_shapes
from esper.tolaria.data.clusters import draw_share
from esper.tolaria.data.parts import Bundle, Part
from esper.tolaria.data.refills import Refills
from esper.tolaria.data.sampler import BatchPlan, bounds, draw, draw_groups, eval_shards
from esper.tolaria.growth.continuation import Base, Copies, Lessons
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.lockstep.measure import sample_sums
from esper.tolaria.ranks.world import World
from esper.tolaria.tasks.bind import task_of
from esper.tolaria.training.config import Precision, TrainerConfig
from esper.tolaria.training.looks import refills_of
from esper.tolaria.training.precision import autocast, dtype_of


class Evaluator:
    """Measures a grown model on the parts of a bundle.

    Args:
        grown: model and slots.
        bundle: the data.
        world: says which share of the samples is this rank's.
        precision: number format.
        batch: samples per forward.
        seed: the run's seed, for drawing probe samples.
        channels_last: whether images go to the model in that memory format.
        plan: the global batches of the run, on which copies are continued; None where none are.

    Fields:
        copies: of the network, in which a seed is continued.
        most: samples of a part that are measured at most; None: all.
        validating: makes the context within which validation computes, such as an average of the weights.
        loss_scale: returns the factor of a loss in backward.
    """

    def __init__(
        self,
        grown: Grown,
        bundle: Bundle,
        world: World,
        *,
        precision: Precision,
        batch: int,
        seed: int,
        channels_last: bool = False,
        plan: BatchPlan | None = None,
    ) -> None:
        self.grown, self.bundle, self.world, self.plan = grown, bundle, world, plan
        self.task = task_of(bundle)
        self._refills: Refills | None = None
        self.precision, self.seed = precision, seed
        self.batch = max(batch // self.task.group, 1) * self.task.group  # no group is cut
        self.copies = Copies()
        self.most: int | None = None
        self.validating: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        self.loss_scale: Callable[[], float] = lambda: 1.0
        self.format = torch.channels_last if channels_last else torch.preserve_format

    @classmethod
    def of_run(
        cls, trainer: TrainerConfig, grown: Grown, bundle: Bundle, world: World, plan: BatchPlan, *, seed: int
    ) -> "Evaluator":
        """The evaluator of a run, with the trainer's precision and batch size."""
        made = cls(
            grown,
            bundle,
            world,
            precision=trainer.precision,
            batch=trainer.eval_batch,
            seed=seed,
            channels_last=trainer.channels_last,
            plan=plan,
        )
        made.most = None if trainer.limit is None else trainer.limit * made.batch
        return made

    def of_network(self, grown: Grown) -> "Evaluator":
        """The same evaluator for another network."""
        other = copy.copy(self)
        other.grown = grown
        return other

    def to_device(self, x: Any, y: Any) -> tuple[Any, Any]:
        """Inputs and targets on the device, floating-point ones in the run's number format."""
        dtype = dtype_of(self.precision)

        def put(leaf: Tensor) -> Tensor:
            if not leaf.is_floating_point():
                return self.world.put(leaf)
            return self.world.put(leaf, dtype, self.format if leaf.ndim == 4 else torch.preserve_format)

        def put_target(leaf: Tensor) -> Tensor:
            return self.world.put(leaf, dtype if leaf.is_floating_point() else None)

        return tree_map_only(Tensor, put, x), tree_map_only(Tensor, put_target, y)

    def statistics_batches(self, samples: int, *key: int | str) -> Iterator[tuple[Any, Any]]:
        """Batches of training data from which running statistics are taken anew, the same on every rank.

        Args:
            samples: how many to draw, at most the whole part.
            key: decides with the run's seed which.
        """
        part = self.bundle.train
        chosen = draw(len(part), min(samples, len(part)), "statistics", self.seed, *key)
        for indices in chosen.tensor_split(-(-len(chosen) // self.batch)):  # about equal: each counts the same
            x, y = self.bundle.train_batch(indices, seed=self.seed, epoch=0)
            finite = finite_samples(x, len(indices))
            if finite.sum() > 1:  # a broken sample must not speak for its batch
                yield self.to_device(*keep_samples((x, y), finite))

    def _train_forward(self, batch: tuple[Any, Any]) -> None:
        args, kwargs = arguments(batch[0])
        with confident(self.grown, *args, **kwargs):
            self.grown.model(*args, **kwargs)

    def _losses(self, part: Part, indices: Tensor) -> tuple[Tensor, ...]:
        """Per-sample loss and correctness, float64 [N], and the task's further numbers, if any, [N, C]."""
        x, y = self.to_device(*part.fetch(indices))
        scores = self.task.scored(self._forward(self.grown, x), y)
        self.task.one_each(scores.loss, len(indices))
        correct = torch.zeros_like(scores.loss) if scores.correct is None else scores.correct
        rows = self.task.rows(scores)
        own = () if rows is None else (rows.double(),)
        return (scores.loss.double(), correct.double(), *own)

    def _forward(self, grown: Grown, x: Any) -> Any:
        args, kwargs = arguments(x)
        try:
            with autocast(self.precision, self.world.device), confident(grown, *args, **kwargs):
                return grown.model(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            refuse_other_shapes(error, x, self.bundle.example())
            raise

    def _judge(self, grown: Grown, batch: tuple[Any, Any], *, learning: bool = False) -> Tensor:
        """Per-sample loss by a network, [N], with a gradient where the caller wants one.

        Args:
            grown: the network.
            batch: inputs and targets.
            learning: the loss that is trained, where it differs from the one that is judged.
        """
        x, y = self.to_device(*batch)
        output = self._forward(grown, x)
        return self.task.learned(output, y) if learning else self.task.scored(output, y).loss

    def part_sums(self, part: Part) -> dict[str, float]:
        """`sample_sums` of this rank's share of ``part``, with the task's further sums."""
        size = len(part) if self.most is None else min(len(part), self.most)
        shards = eval_shards(size, self.world.rank, self.world.size, self.batch, self.task.group)
        with evaluating(self.grown.model):
            return sample_sums((self._losses(part, indices) for indices in shards), self.task.columns)

    def validation_sums(self, statistics: int = 0) -> dict[str, float]:
        """`part_sums` of the validation part.

        Args:
            statistics: training samples from which running statistics are taken anew for it; 0: the model's own.
        """
        with self.validating(), contextlib.ExitStack() as stack:
            if statistics:
                batches = self.statistics_batches(statistics, "validation")
                with autocast(self.precision, self.world.device):
                    (taken,) = take_statistics(self.grown, [{}], batches, self._train_forward)
                stack.enter_context(taken.applied())
            return self.part_sums(self.bundle.validation)

    def birth_sums(self, slot: str, generation: int, gates: GateConfig) -> tuple[dict[str, float], ...]:
        """`sample_sums` at alpha 0 and at alpha 1 of probe samples that (run seed, slot, generation) name."""
        part, sums = self.bundle.probe, []
        count, group = min(gates.probe_samples, len(part)), self.task.group
        chosen = draw_groups(len(part), count, group, "birth", self.seed, slot, generation)
        for alpha in (0.0, 1.0):
            with evaluating(self.grown.model), self.grown.override({slot: alpha}):
                sums.append(sample_sums(self._losses(part, indices)[:2] for indices in chosen.split(self.batch)))
        return tuple(sums)

    def probe_sums(self, slot: str, request: ProbeRequest, gates: GateConfig) -> dict[str, float]:
        """Paired evidence on this rank's share of the samples that the request draws.

        Returns `paired_sums`. The clusters are a function of (run seed, slot, draw key, look); no reported number uses
        the probe part. Running statistics of both arms come from ``gates.statistics_samples`` training samples that the
        same key names.
        """
        part, clusters = self.bundle.probe, self.bundle.probe_clusters
        key = ("probe", self.seed, slot, request.draw)
        if request.refill:
            part, clusters = self.bundle.train, self.bundle.train_clusters
            drawn = self._refill(request.look, gates)
        else:
            drawn = draw_share(len(clusters), request.look, request.shares, self.world.rank, self.world.size, *key)
        chosen, places = clusters.members(drawn)
        shares = [indices for indices in chosen.split(self.batch) if len(indices)]
        batches = (self.to_device(*part.fetch(indices)) for indices in shares)
        with autocast(self.precision, self.world.device):
            return paired_sums(
                self.grown,
                slot,
                request.alpha,
                batches,
                self.task.per_sample,
                self.statistics_batches(gates.statistics_samples, slot, request.draw, request.look),
                clusters=places,
            )

    def _refill(self, look: int, gates: GateConfig) -> Tensor:
        """This rank's clusters of a share of training samples that have not been trained on, int64."""
        assert self.plan is not None
        if self._refills is None:
            probe = plan_probe(
                len(self.bundle.probe),
                len(self.bundle.probe_clusters),
                per_look=gates.probe_samples,
                reserve=gates.reserve,
            )
            self._refills = refills_of(probe, self.bundle, self.plan)
        share = self._refills.shares[look - 1]
        first, last = bounds(len(share), self.world.rank, self.world.size)
        return share[first:last]

    def worth_sums(self, plan: Plan, gates: GateConfig, tick: int) -> Sums:
        """What the plan's seeds are worth, on this rank's share of validation samples that the tick names."""
        part = self.bundle.validation
        group = self.task.group
        chosen = draw_groups(len(part), min(gates.probe_samples, len(part)), group, "worth", self.seed, tick)
        first, last = (group * end for end in bounds(len(chosen) // group, self.world.rank, self.world.size))
        shares = [indices for indices in chosen[first:last].split(self.batch) if len(indices)]
        batches = (self.to_device(*part.fetch(indices)) for indices in shares)
        statistics = self.statistics_batches(gates.statistics_samples, "worth", tick)
        with autocast(self.precision, self.world.device):
            return attribute(self.grown, plan, batches, self.task.per_sample, statistics=statistics)

    def continued_sums(self, state: RunState, owner: ParameterOwner, gates: GateConfig, step: int) -> dict[str, float]:
        """A piece of evidence on whether the help of a seed lasts, on this rank's clusters of the whole probe.

        Copies of the network take the first samples of each batch of the run's own next steps, in their order and
        backwards; every rank takes the same ones. Returns the sums of `esper.tolaria.growth.continuation.Copies`.
        """
        return self.copies.take_piece(state, owner, gates, step, lambda base: self._lessons(base, gates))

    def _lessons(self, base: Base, gates: GateConfig) -> Lessons:
        asked, plan = base.record.continuing, self.plan
        assert asked is not None
        assert plan is not None
        part, known = self.bundle.probe, self.bundle.probe_clusters
        key = ("continued", self.seed, asked.slot, asked.tick)
        chosen, places = known.members(draw_share(len(known), 1, 1, self.world.rank, self.world.size, *key))

        def batch(further: int) -> tuple[Any, Any]:
            at = base.record.governor.cursor(base.step + further)
            epoch, _ = plan.locate(at)
            most = max(gates.continue_batch // self.task.group, 1) * self.task.group
            return self.bundle.train_batch(plan.indices(at)[:most], seed=self.seed, epoch=epoch)

        def judge(grown: Grown) -> Tensor:
            with evaluating(grown.model):
                shares = [indices for indices in chosen.split(self.batch) if len(indices)]
                losses = [self._judge(grown, part.fetch(indices)).double().cpu() for indices in shares]
            return torch.cat([torch.zeros(0, dtype=torch.float64), *losses])

        return Lessons(
            batch=batch,
            learn=lambda grown, batch: self._judge(grown, (copy_inputs(batch[0]), batch[1]), learning=True),
            judge=judge,
            clusters=places,
            seed=digest62(list(key)),
            scale=self.loss_scale(),
        )
