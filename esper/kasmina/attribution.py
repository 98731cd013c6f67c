"""What seeds are worth: counterfactuals of a grown model on the same samples, seeds switched by alpha overrides.

The value of a coalition of seeds (see `esper.kasmina.coalitions`), per sample, is minus the loss in nats, and the share
of correct answers; so every quantity is positive where the seed helps. What comes out of the model are sums over
samples: those of all ranks are added, and the result does not depend on the sharding. `readings` then turns summed sums
into numbers with errors. Every coalition is one full forward per batch; `Sums.forwards` counts them.

    plan = make_plan(blended(grown))                        equal on all ranks
    sums = attribute(grown, plan, batches, per_sample)      this rank's share of the samples
    worth = readings(sums, tick=tick, min_samples=30)       after adding up `sums.vector()` over ranks

Shapes: B samples of a batch, M coalitions, Q quantities, 2 units (loss, accuracy).
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from esper.kasmina.attach import Grown
from esper.kasmina.coalitions import Kind, Plan, Quantity
from esper.kasmina.confidence import confident, evaluating
from esper.kasmina.slot import Phase
from esper.leyline.errors import ConfigError
from esper.leyline.evidence import Reading, measured, paired
from esper.leyline.slots import parse_slot

# per_sample(model output, target) -> loss [B] in nats, correct [B] in [0, 1]; a sequence is one sample
PerSample = Callable[[Any, Any], tuple[Tensor, Tensor]]


def blended(grown: Grown) -> dict[str, float]:
    """Committed alpha of every seed that takes part in the host's forward now: the usual ``levels`` of a plan."""
    return {slot: s.level for slot, s in grown.slots.items() if s.seed is not None and s.phase is Phase.BLEND}


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over one shard's samples, d being a quantity's value for one sample; those of shards are added by ``+``.

    Fields:
        plan: what was summed.
        samples, forwards: samples seen; calls of the model, each a full forward of one batch.
        moments: per quantity, in the plan's order: (sum d, sum d^2) in nats, then in share of correct answers.
    """

    plan: Plan
    samples: int
    forwards: int
    moments: tuple[tuple[float, float, float, float], ...]

    @property
    def sample_passes(self) -> int:
        """Samples times coalitions: full forwards of one sample, for a FLOP account."""
        return self.samples * len(self.plan.coalitions)

    def table(self) -> dict[Quantity, tuple[float, float, float, float]]:
        """Moments by quantity."""
        return {quantity: row for (quantity, _), row in zip(self.plan.quantities, self.moments, strict=True)}

    def vector(self) -> list[float]:
        """Samples, forwards, moments: what travels. Its length, 2 + 4 Q, follows from the plan."""
        return [float(self.samples), float(self.forwards), *(number for row in self.moments for number in row)]

    @classmethod
    def of(cls, plan: Plan, vector: Sequence[float]) -> "Sums":
        """Takes back an (added up) `vector`; ValueError where its length is not the plan's."""
        if len(vector) != 2 + 4 * len(plan.quantities):
            raise ValueError(f"{len(vector)} numbers do not fit the plan: need {2 + 4 * len(plan.quantities)}")
        rows = [vector[i : i + 4] for i in range(2, len(vector), 4)]
        return cls(plan, round(vector[0]), round(vector[1]), tuple((a, b, c, d) for a, b, c, d in rows))

    def __add__(self, other: "Sums") -> "Sums":
        if self.plan != other.plan:
            raise ValueError("sums of different plans cannot be added: seeds, alphas, pairs and key must be equal")
        return Sums.of(self.plan, [a + b for a, b in zip(self.vector(), other.vector(), strict=True)])


def differences(plan: Plan, values: Tensor) -> Tensor:
    """Every quantity per sample, float64 [Q, 2, B].

    Args:
        values: of the plan's coalitions in its order, [M, 2, B]. A quantity reads only those that it names, so that a
            value that is not finite stays where it belongs.
    """
    row = {coalition: i for i, coalition in enumerate(plan.coalitions)}
    values = values.double()
    rows = []
    for _, terms in plan.quantities:
        marginals = [term.weight * (values[row[term.within]] - values[row[term.without]]) for term in terms]
        rows.append(torch.stack(marginals).sum(0) if len(marginals) > 1 else marginals[0])
    return torch.stack(rows)


def _value(loss: Tensor, correct: Tensor) -> Tensor:
    if loss.ndim != 1 or loss.shape != correct.shape:
        raise ValueError(
            f"per_sample returned loss {list(loss.shape)} and correct {list(correct.shape)}, need both [B]: one number "
            "per sample, not their mean"
        )
    return torch.stack([-loss.double(), correct.double()])


def attribute(grown: Grown, plan: Plan, batches: Iterable[tuple[Any, Any]], per_sample: PerSample) -> Sums:
    """Runs every coalition of the plan on every batch, in eval() and without gradient; the model is left as it was.

    All coalitions see the same inputs and the same random numbers, should the model draw any in eval().

    Args:
        grown: model with seeds in the plan's slots.
        plan: see `make_plan`; the same on all ranks.
        batches: this rank's share: pairs of inputs (a tensor, or a tuple of arguments) and target, on the device.
        per_sample: (model output, target) -> loss [B] in nats, correct [B].

    Raises:
        ConfigError: the plan names an unknown slot or one without a seed.
        ValueError: ``per_sample`` returned something else than one number per sample.
    """
    for slot, _ in plan.levels:
        parse_slot(slot, grown.slots)
        if grown.slots[slot].seed is None:
            raise ConfigError(f"slot {slot}: holds no seed, so there is nothing to attribute; leave it out")
    devices = sorted({p.device for p in grown.model.parameters() if p.is_cuda}, key=str)
    samples = forwards = 0
    total = torch.zeros(len(plan.quantities), 4, dtype=torch.float64)
    with evaluating(grown.model):
        for inputs, target in batches:
            args = inputs if isinstance(inputs, tuple) else (inputs,)
            values = []
            for coalition in plan.coalitions:
                own = tree_map_only(Tensor, torch.clone, args)  # a model may write into its input
                with grown.override(plan.alphas(coalition)), torch.random.fork_rng(devices), confident(grown, *own):
                    values.append(_value(*per_sample(grown.model(*own), target)))
            d = differences(plan, torch.stack(values))
            total = total.to(d.device) + torch.stack([d.sum(2), (d * d).sum(2)], 2).flatten(1)
            samples += d.shape[2]
            forwards += len(plan.coalitions)
    return Sums(plan, samples, forwards, tuple((a, b, c, e) for a, b, c, e in total.tolist()))


@dataclass(frozen=True, slots=True)
class Worth:
    """One quantity in both units; positive helps.

    Fields:
        loss: nats per sample. accuracy: share of correct answers. Their errors count samples and drawn orders.
        loss_order_se, accuracy_order_se: the part of the error that comes from drawing orders alone; 0 where nothing
            was drawn, None where the reading is absent.
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
        """Each seed alone, against none."""
        return {slot: self.coalitions[(slot,)] for slot in self.shapley}

    @property
    def together(self) -> Worth:
        """All seeds against none (all-off)."""
        return self.coalitions[tuple(self.shapley)]


def readings(sums: Sums, *, tick: int, min_samples: int) -> Attribution:
    """Means and standard errors from sums that were added up over all shards; pure.

    The error of a drawn Shapley value is sqrt(e^2 + o^2): e the error over samples, o that over pairs of orders.

    Args:
        tick: when they were summed. min_samples: below it a reading is absent (`esper.leyline.evidence.paired`).
    """
    table = sums.table()

    def worth(quantity: Quantity) -> Worth:
        found: list[tuple[Reading, float | None]] = []
        for first in (0, 2):
            total, squares = table[quantity][first : first + 2]
            reading = paired(sums.samples, total, squares, tick=tick, min_samples=min_samples)
            if reading.value is None or reading.se is None:
                found.append((reading, None))
                continue
            order_se = 0.0
            if quantity.kind is Kind.SHAPLEY and sums.plan.pairs:
                each = [table[Quantity(Kind.PAIR, quantity.seeds, k)][first] for k in range(sums.plan.pairs)]
                order_se = statistics.stdev(each) / sums.samples / math.sqrt(sums.plan.pairs)
            se = math.hypot(reading.se, order_se)
            found.append((measured(reading.value, tick=tick, n=reading.n, se=se), order_se))
        (loss, loss_se), (accuracy, accuracy_se) = found
        return Worth(loss, accuracy, loss_se, accuracy_se)

    of = {kind: {q.seeds: worth(q) for q in table if q.kind is kind} for kind in Kind if kind is not Kind.PAIR}
    per_slot = {kind: {seeds[0]: w for seeds, w in rows.items()} for kind, rows in of.items()}
    return Attribution(of[Kind.COALITION], per_slot[Kind.LEAVE_ONE_OUT], per_slot[Kind.SHAPLEY])
