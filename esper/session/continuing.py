"""Continues a session's network in copies, on the batches of this rank since the last tick.

They are taken again and again, in their order and backwards. Each rank judges its own clusters of the whole probe.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from esper.accord.config import GateConfig
from esper.accord.evidence.lasting import marks_of
from esper.accord.state import RunState
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.grown import Grown
from esper.leyline.plain import digest62
from esper.session.batches import Batches, tensors_of
from esper.session.model import StandIn
from esper.tolaria.growth.continuation import continue_network, continued_sums
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.ranks.world import World

LIMIT = 64 * 2**20  # bytes


class RecentBatches:
    """Keeps copies of the batches since the last tick while a seed waits to be continued, up to `LIMIT` bytes.

    A save lets go of them, so that a session that goes on after it and one that is restored from it judge alike.
    """

    def __init__(self) -> None:
        self._batches: list[Any] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def keep(self, batch: Any) -> None:
        """Keeps a copy of a batch; the first one always, a further one if there is room."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
        if self._batches and self._bytes + size > LIMIT:
            return
        self._batches.append(copy_inputs(batch))
        self._bytes += size

    def clear(self) -> None:
        """Lets go of all of them."""
        self._batches, self._bytes = [], 0

    def orders(self, steps: int) -> tuple[list[Any], list[Any]]:
        """``steps`` batches, going round, in their order and backwards."""
        forward = [self._batches[step % len(self._batches)] for step in range(steps)]
        return forward, forward[::-1]


class Judging(Protocol):
    """What a continuation needs of the session's evaluator, `esper.session.batches.BatchEvaluator`."""

    world: World
    seed: int
    recent: RecentBatches
    scale: Callable[[], float]

    @property
    def probe(self) -> Batches | None:
        """The probe; None without one."""

    @property
    def judge(self) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
        """The per-sample loss of a batch; None if the user gave none."""


def continue_session(
    session: Judging, state: RunState, owner: ParameterOwner, slot: str, gates: GateConfig, step: int
) -> dict[str, float]:
    """Evidence on whether the help of a seed lasts; this rank's sums.

    Args:
        session: judges batches, and has those since the last tick; they are let go of.
        state: agreed at the last tick.
        owner: of the network.
        slot: that holds the seed.
        gates: how copies are continued.
        step: optimizer steps done.

    Returns:
        `continued_sums` of `esper.tolaria.growth.continuation`, and the samples that copies with the seed were
        ``trained`` on. No evidence if no batch was seen since the last tick, or the last save.
    """
    part, judge = session.probe, session.judge
    if part is None or judge is None or not len(session.recent):
        return {"nonfinite": 1.0}
    key = ("continued", session.seed, slot, state.tick)
    units, clusters = part.draw_look(1, 1, session.world.rank, session.world.size, *key)
    orders = session.recent.orders(gates.continue_steps)
    session.recent.clear()

    def judge_all(grown: Grown) -> Tensor:
        with evaluating(grown.model):
            losses = [judge(StandIn(grown, grown.model), copy_inputs(batch))[0] for batch in part.batches(units)]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(loss.double().cpu() for loss in losses)])

    def continue_once(ordered: Sequence[Any], keep: bool) -> Tensor:
        return continue_network(
            owner,
            slot,
            ordered,
            marks_of(gates.continue_steps),
            keep=keep,
            learn=lambda grown, batch: judge(StandIn(grown, grown.model), copy_inputs(batch))[0].mean(),
            judge=judge_all,
            learn_steps={entry.slot: entry.learn_step for entry in state.slots},
            step=step,
            seed=digest62(list(key)),
            scale=session.scale(),
        )

    trained = 2 * sum(len(tensors_of(batch)[0]) for batch in orders[0])
    return continued_sums(continue_once, orders, clusters) | {"trained": float(trained)}
