"""Measures a grown model by a user's own loss, on the user's own batches."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.accord.config import GateConfig
from esper.accord.evidence.continuing import begin_anew
from esper.accord.lifecycle import ProbeRequest
from esper.accord.state import RunState
from esper.kasmina.attribution.coalitions import Plan
from esper.kasmina.attribution.prefixes import How
from esper.kasmina.attribution.probe import difference_sums
from esper.kasmina.attribution.statistics import Alphas, Statistics, take_statistics
from esper.kasmina.attribution.worth import Sums, differences
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import undisturbed
from esper.session.batches import Batches
from esper.session.continuing import RecentBatches, continue_session
from esper.tolaria.growth.continuation import Copies
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.lockstep.measure import sample_sums
from esper.tolaria.ranks.world import World

# (stand-in for the model, batch) -> per-sample loss [B], and correctness [B] or None
Judge = Callable[[Callable[..., Any], Any], tuple[Tensor, Tensor | None]]


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
        scale: factor of the losses in backward, for half precision.
        seed: the run's seed.

    Fields:
        recent: the newest batches, while a seed may be continued in copies.
        copies: of the network, in which a seed is continued.
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
        scale: Callable[[], float] = lambda: 1.0,
        seed: int,
    ) -> None:
        self.grown, self.world, self.judge, self.model = grown, world, judge, model
        self.probe, self.validation, self.seed = probe, validation, seed
        self.statistics = statistics or probe
        self.scale, self.recent, self.copies = scale, RecentBatches(), Copies()

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
        rank, world, key = self.world.rank, self.world.size, ("probe", self.seed, slot, request.draw)
        units, clusters = part.draw_look(request.look, request.shares, rank, world, *key)
        arms: list[Alphas] = [{slot: 0.0}, {slot: request.alpha}]
        taken = self._take_statistics(arms, gates.statistics_samples, slot, request.draw, request.look)
        with evaluating(self.grown.model):
            differences = [self._difference(batch, arms, taken) for batch in part.batches(units)]
        return difference_sums(differences, clusters=clusters)

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

    def continued_sums(self, state: RunState, owner: ParameterOwner, gates: GateConfig, step: int) -> dict[str, float]:
        """See `esper.session.continuing`."""
        return continue_session(self, state, owner, gates, step)

    def continue_anew(self, state: RunState) -> RunState:
        """Lets go of what a seed is continued on, batches and copies; the state in which it begins anew."""
        self.recent.clear()
        self.copies.drop()
        return begin_anew(state)
