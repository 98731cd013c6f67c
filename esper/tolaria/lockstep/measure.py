"""The measurements of one rank for a tick: its entries of the observe vector."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Protocol

import torch
from torch import Tensor

from esper.accord.account import moved_lately
from esper.accord.config import GateConfig
from esper.accord.lifecycle import ProbeRequest
from esper.accord.state import RunState, Terms
from esper.kasmina.attribution.coalitions import Plan
from esper.kasmina.attribution.worth import Sums, blended
from esper.kasmina.slots.grown import HOST, Grown
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.lockstep.window import Window
from esper.tolaria.lockstep.worth import plan_worth, worth_flops, worth_values
from esper.tolaria.ranks.world import World


class Measures(Protocol):
    """An evaluator: sums over this rank's share of the samples, without a collective; it leaves the model as it was."""

    grown: Grown
    world: World

    def validation_sums(self, statistics: int = 0) -> dict[str, float]:
        """`sample_sums` of the samples that are held out; empty if there are none.

        Args:
            statistics: samples from which running statistics are taken anew for it; 0: the model's own.
        """

    def probe_sums(self, slot: str, request: ProbeRequest, gates: GateConfig) -> dict[str, float]:
        """Paired evidence for one look; see `esper.kasmina.attribution.probe.difference_sums`."""

    def worth_sums(self, plan: Plan, gates: GateConfig, tick: int) -> Sums | None:
        """Attribution on this rank's share of the validation samples that the tick names; None without any."""

    def continued_sums(self, state: RunState, owner: ParameterOwner, gates: GateConfig, step: int) -> dict[str, float]:
        """A piece of the continuation in copies that is under way; see `esper.tolaria.growth.continuation`. Lets go of
        copies if there is none."""


def sample_sums(batches: Iterable[tuple[Tensor, ...]], columns: Sequence[str] = ()) -> dict[str, float]:
    """Sums over samples of a loss and of a correctness, and of their squares, and of a task's further numbers.

    Args:
        batches: loss and correctness of each sample of a batch, float64 [B] each, on any device; with ``columns`` also
            float64 [B, C].
        columns: names of the task's further sums.

    Returns:
        loss, loss_sq, correct, correct_sq, sum_<column> of each column, count.
    """
    total, count = torch.zeros(4 + len(columns), dtype=torch.float64), 0
    for loss, correct, *rows in batches:
        sums = torch.stack([loss.sum(), (loss * loss).sum(), correct.sum(), (correct * correct).sum()])
        if columns:
            sums = torch.cat([sums, rows[0].sum(0)])
        total = total.to(loss.device) + sums
        count += len(loss)
    names = ("loss", "loss_sq", "correct", "correct_sq", *(f"sum_{name}" for name in columns))
    return {**dict(zip(names, total.tolist(), strict=True)), "count": float(count)}


def measure(
    state: RunState,
    owner: ParameterOwner,
    evaluator: Measures,
    window: Window,
    terms: Terms,
    *,
    step: int,
    validate: bool,
    attribute: bool = False,
) -> tuple[dict[str, float], int]:
    """Measures the sums since the last tick, validation if it is due, and the evidence that the last tick asked for.

    Args:
        state: agreed at the last tick; its requests say what to probe.
        owner: owns this rank's optimizer.
        evaluator: measures this rank's model.
        window: this rank's counts since the last tick.
        terms: of the run; its gates say how many samples a look draws.
        step: optimizer steps done.
        validate: whether validation is due.
        attribute: whether an attribution is due.

    Returns:
        Entries of the observe vector by name, and how many of this rank's samples had a non-finite loss.
    """
    gates = terms.gates
    values, nonfinite = window.values([entry.slot for entry in state.slots if entry.stage.has_seed])
    for whose, health in owner.health.take().items():
        prefix = "host_" if whose == HOST else f"{whose}."
        values |= {f"{prefix}{name}": float(value) for name, value in asdict(health).items()}
    if validate:
        moved = moved_lately(state.slots, state.tick, step, terms.tick_steps)
        sums = evaluator.validation_sums(gates.statistics_samples if moved else 0)
        values |= {f"validation_{name}": value for name, value in sums.items()}
    owned = owner.owned_slots()
    for entry in state.slots:
        holder = evaluator.grown.slots[entry.slot]
        if holder.seed is not None:
            finite = all(bool(torch.isfinite(parameter).all()) for parameter in holder.parameters())
            values[f"{entry.slot}.finite"] = float(finite)
            values[f"{entry.slot}.owned"] = float(entry.slot in owned)
            values[f"{entry.slot}.degraded"] = float(evaluator.grown.slots[entry.slot].degraded is not None)
            count, total, squares = holder.tally.take()
            values[f"{entry.slot}.gate_count"] = count
            values[f"{entry.slot}.gate_sum"] = total
            values[f"{entry.slot}.gate_sum_sq"] = squares
        if entry.staged is not None:
            count, total, _ = holder.heard.take()
            values |= {f"{entry.slot}.feature_count": count, f"{entry.slot}.feature_sq": total}
        if entry.request is not None:
            sums = evaluator.probe_sums(entry.slot, entry.request, terms.gates)
            values |= {f"{entry.slot}.probe_{name}": value for name, value in sums.items()}
    if attribute:
        values |= _worth(state, evaluator, terms)
    sums = evaluator.continued_sums(state, owner, gates, step)
    values |= {f"continued_{name}": value for name, value in sums.items()}
    return values, nonfinite


def _worth(state: RunState, evaluator: Measures, terms: Terms) -> dict[str, float]:
    """Entries of the observe vector on what each blended seed is worth; none without such seeds."""
    levels = blended(evaluator.grown)
    if not levels:
        return {}
    found = evaluator.worth_sums(plan_worth(levels, state.tick), terms.gates, state.tick)
    if found is None:
        return {}
    blueprints = {entry.slot: str(entry.blueprint) for entry in state.slots}
    rank = evaluator.world.rank
    return worth_values(found, worth_flops(found, terms.costs, blueprints, rank) if terms.costs is not None else 0)
