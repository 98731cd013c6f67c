"""The worth of seeds: counterfactuals of a grown model on the same samples, with seeds switched by alpha overrides.

A coalition of seeds (see `coalitions`) has two values per sample, minus the loss in nats and the share of correct
answers, so that every quantity is positive where the seed helps. Measuring gives sums over samples: those of all ranks
are added, so the result does not depend on the sharding, and `readings` turns the total into numbers with errors. On
hosts that can resume from a slot, coalitions share what comes before the first slot in which they differ (see
`prefixes`), to the same bits as full forwards; other hosts run full forwards. `Sums.work` counts either.

    plan = make_plan(blended(grown))                        equal on all ranks
    sums = attribute(grown, plan, batches, per_sample)      this rank's share of the samples
    worth = readings(sums, tick=tick, min_samples=30)       after adding up `sums.vector()` over ranks

Shapes: B samples of a batch, M coalitions, Q quantities, 2 units (loss, accuracy).
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from esper.kasmina.attribution.coalitions import ASKED, Plan, Quantity, QuantityKind
from esper.kasmina.attribution.prefixes import Entry, How, account
from esper.kasmina.attribution.statistics import Statistics, take_statistics, tracking
from esper.kasmina.attribution.values import PerSample, values_of
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.hosts.resume import resumable
from esper.kasmina.slots.confidence import confident, evaluating
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import arguments
from esper.kasmina.slots.slot import Phase
from esper.leyline.errors import ConfigError
from esper.leyline.evidence import Reading, estimate_mean, measured
from esper.leyline.slots import parse_slot


def blended(grown: Grown) -> dict[str, float]:
    """Returns the committed alpha of every seed active in the host's forward now: the usual ``levels`` of a plan."""
    return {slot: s.level for slot, s in grown.slots.items() if s.seed is not None and s.phase is Phase.BLEND}


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over one shard's samples, d being a quantity's value for one sample; shards are added by ``+``.

    Fields:
        plan: the plan that was measured.
        samples: samples seen.
        forwards: outputs of the model, one per coalition and batch.
        moments: per quantity, in the plan's order: (sum d, sum d^2) in nats, then in share of correct answers.
        order: slots in the order of execution if the host resumed from them, None if every forward was full.
        how: prefixes shared, coalitions stacked, or neither.
        asking: slots whose active seed needs class logits (CONFIDENCE), which cost one more forward without such seeds.
        statistics: samples from which this rank took each coalition's running statistics; 0 for a model without any.
    """

    plan: Plan
    samples: int
    forwards: int
    moments: tuple[tuple[float, float, float, float], ...]
    order: tuple[str, ...] | None
    how: How
    asking: tuple[str, ...]
    statistics: int = 0

    def work(self) -> Counter[Entry]:
        """Counts passes of one sample through each part of the forward, with its seeds, for a FLOP account."""
        passes = account(self.plan, self.order, self.how, self.asking)
        work = Counter({entry: n * self.samples for entry, n in passes.items()})
        if self.statistics:  # by full forwards
            for entry, n in account(self.plan, None, How.FULL, self.asking).items():
                work[entry] += n * self.statistics
        return work

    def table(self) -> dict[Quantity, tuple[float, float, float, float]]:
        """Returns the moments by quantity."""
        return {quantity: row for (quantity, _), row in zip(self.plan.quantities, self.moments, strict=True)}

    def vector(self) -> list[float]:
        """Returns samples, forwards and moments as ranks exchange them; 2 + 4 Q numbers, as the plan says."""
        return [float(self.samples), float(self.forwards), *(number for row in self.moments for number in row)]

    def taking(self, vector: Sequence[float]) -> "Sums":
        """Returns the same sums with the numbers of a `vector`, for example one added up over ranks.

        Raises:
            ValueError: the vector's length does not fit the plan.
        """
        if len(vector) != 2 + 4 * len(self.plan.quantities):
            raise ValueError(f"{len(vector)} numbers do not fit the plan: need {2 + 4 * len(self.plan.quantities)}")
        rows = [vector[i : i + 4] for i in range(2, len(vector), 4)]
        moments = tuple((a, b, c, d) for a, b, c, d in rows)
        return replace(self, samples=round(vector[0]), forwards=round(vector[1]), moments=moments)

    def __add__(self, other: "Sums") -> "Sums":
        if (self.plan, self.order, self.how, self.asking) != (other.plan, other.order, other.how, other.asking):
            raise ValueError("sums of different plans cannot be added: seeds, alphas, pairs and key must be equal")
        both = self.taking([a + b for a, b in zip(self.vector(), other.vector(), strict=True)])
        return replace(both, statistics=self.statistics + other.statistics)


def differences(plan: Plan, values: Tensor) -> Tensor:
    """Computes every quantity per sample, float64 [Q, 2, B].

    Args:
        plan: the quantities.
        values: values of the plan's coalitions in its order, [M, 2, B]. A quantity reads only those that it names, so
            that a value that is not finite affects no other quantity.
    """
    row = {coalition: i for i, coalition in enumerate(plan.coalitions)}
    values = values.double()
    rows = []
    for _, terms in plan.quantities:
        marginals = [term.weight * (values[row[term.within]] - values[row[term.without]]) for term in terms]
        rows.append(torch.stack(marginals).sum(0) if len(marginals) > 1 else marginals[0])
    return torch.stack(rows)


def _asks_logits(grown: Grown, plan: Plan, slot: str) -> bool:
    levels = dict(plan.levels)
    with grown.override({slot: levels[slot]} if slot in levels else {}):
        return grown.slots[slot].asks_logits


def _statistics_of(
    grown: Grown, plan: Plan, batches: Iterable[tuple[Any, Any]] | None
) -> tuple[dict[int, Statistics], int]:
    """Running statistics of each coalition, and the samples that each took them from; nothing where there are none."""
    if batches is None or not tracking(grown.model):
        return {}, 0
    samples = 0

    def read() -> Iterator[Any]:
        nonlocal samples
        for inputs, _ in batches:
            samples += len(next(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)))
            yield inputs

    def forward(inputs: Any) -> None:
        args, kwargs = arguments(copy_inputs(inputs))
        with confident(grown, *args, **kwargs):
            grown.model(*args, **kwargs)

    arms = [plan.alphas(coalition) for coalition in plan.coalitions]
    taken = take_statistics(grown, arms, read(), forward)
    return dict(zip(plan.coalitions, taken, strict=True)), samples


def attribute(
    grown: Grown,
    plan: Plan,
    batches: Iterable[tuple[Any, Any]],
    per_sample: PerSample,
    *,
    how: How = How.SHARED,
    each: Callable[[Tensor], object] | None = None,
    statistics: Iterable[tuple[Any, Any]] | None = (),
) -> Sums:
    """Runs every coalition of the plan on every batch, in eval() and without gradient; the model is left as it was.

    All coalitions see the same inputs and the same random numbers, should the model draw any in eval().

    Args:
        grown: model with seeds in the plan's slots.
        plan: see `make_plan`; the same on all ranks.
        batches: this rank's share: pairs of inputs (a tensor, a tuple of arguments or a dict of keywords) and
            target, on the device.
        per_sample: (model output, target) -> loss [B] in nats, correct [B].
        how: the kind of forwards; SHARED and FULL give the same bits, STACKED agrees to rounding. A host that cannot
            resume has no prefix to share, and if class logits are asked for (CONFIDENCE) every forward is full.
        each: called with every batch's quantities per sample, float64 [Q, 2, B], for sums of the caller's own.
        statistics: batches of training data in the form of ``batches``, the same on every rank, from which each
            coalition takes running statistics of its own (`esper.kasmina.attribution.statistics`); STACKED then becomes
            SHARED. A model without such statistics reads none of them. None: all coalitions have the model's present
            ones, which are right only for the network that took them.

    Raises:
        ConfigError: the plan names an unknown slot or one without a seed; or the model has BatchNorm and there are no
            batches to take its statistics from.
        ValueError: ``per_sample`` returned something other than one number per sample.
    """
    for slot, _ in plan.levels:
        parse_slot(slot, grown.slots)
        if grown.slots[slot].seed is None:
            raise ConfigError(f"slot {slot}: holds no seed, so there is nothing to attribute; leave it out")
    asking = tuple(slot for slot in grown.slots if _asks_logits(grown, plan, slot))
    how = How.FULL if asking else How(how)  # class logits depend on what comes after a slot
    taken, seen = _statistics_of(grown, plan, statistics)
    if taken and how is How.STACKED:
        how = How.SHARED  # one forward has one set of statistics
    host = None if how is How.FULL else resumable(grown)
    samples = forwards = 0
    total = torch.zeros(len(plan.quantities), 4, dtype=torch.float64)
    with evaluating(grown.model):
        for inputs, target in batches:
            d = differences(plan, values_of(grown, plan, how, host, inputs, target, per_sample, taken))
            if each is not None:
                each(d)
            total = total.to(d.device) + torch.stack([d.sum(2), (d * d).sum(2)], 2).flatten(1)
            samples += d.shape[2]
            forwards += len(plan.coalitions)
    moments = tuple((a, b, c, e) for a, b, c, e in total.tolist())
    return Sums(plan, samples, forwards, moments, host.slot_order() if host else None, how, asking, seen)


@dataclass(frozen=True, slots=True)
class Worth:
    """One quantity in both units; positive helps.

    Fields:
        loss: in nats per sample; its error covers samples and drawn orders.
        accuracy: in share of correct answers; its error covers samples and drawn orders.
        loss_order_se: the part of the loss's error that comes from drawing orders alone; 0 where nothing was drawn,
            None where the reading is absent.
        accuracy_order_se: the same for the accuracy.
    """

    loss: Reading
    accuracy: Reading
    loss_order_se: float | None
    accuracy_order_se: float | None


@dataclass(frozen=True, slots=True)
class Attribution:
    """Readings of a plan's quantities: `coalitions` by their slots (row-major), the others by slot."""

    coalitions: dict[tuple[str, ...], Worth]
    leave_one_out: dict[str, Worth]
    shapley: dict[str, Worth]

    @property
    def solo(self) -> dict[str, Worth]:
        """Each seed alone, against none; empty where the plan asked for no coalitions."""
        return {seeds[0]: worth for seeds, worth in self.coalitions.items() if len(seeds) == 1}

    @property
    def together(self) -> Worth:
        """All seeds against none (all-off); KeyError where the plan asked for no coalitions."""
        return self.coalitions[max(self.coalitions, key=len, default=())]


def readings(sums: Sums, *, tick: int, min_samples: int) -> Attribution:
    """Computes means and standard errors from sums that were added up over all shards; pure.

    The error of a drawn Shapley value is sqrt(e^2 + o^2): e the error over samples, o that over pairs of orders.

    Args:
        sums: the sums of all shards.
        tick: the tick at which they were summed.
        min_samples: with fewer samples a reading is absent (`esper.leyline.evidence.estimate_mean`).
    """
    table = sums.table()

    def worth(quantity: Quantity) -> Worth:
        by_unit: list[tuple[Reading, float | None]] = []
        for first in (0, 2):
            total, squares = table[quantity][first : first + 2]
            reading = estimate_mean(sums.samples, total, squares, tick=tick, min_samples=min_samples)
            if reading.value is None or reading.se is None:
                by_unit.append((reading, None))
                continue
            order_se = 0.0
            if quantity.kind is QuantityKind.SHAPLEY and sums.plan.pairs:
                pairs = [table[Quantity(QuantityKind.PAIR, quantity.seeds, k)][first] for k in range(sums.plan.pairs)]
                order_se = statistics.stdev(pairs) / sums.samples / math.sqrt(sums.plan.pairs)
            se = math.hypot(reading.se, order_se)
            by_unit.append((measured(reading.value, tick=tick, n=reading.n, se=se), order_se))
        (loss, loss_se), (accuracy, accuracy_se) = by_unit
        return Worth(loss, accuracy, loss_se, accuracy_se)

    by_kind = {kind: {q.seeds: worth(q) for q in table if q.kind is kind} for kind in ASKED}
    per_slot = {kind: {seeds[0]: w for seeds, w in rows.items()} for kind, rows in by_kind.items()}
    return Attribution(
        by_kind[QuantityKind.COALITION], per_slot[QuantityKind.LEAVE_ONE_OUT], per_slot[QuantityKind.SHAPLEY]
    )
