"""Continues a session's network in copies, on the newest batches of this rank.

They are taken again and again, in their order and backwards. Each rank judges its own clusters of the whole probe.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from esper.accord.config import Baseline, GateConfig
from esper.accord.state import RunState
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.slots.confidence import evaluating
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import LoopError
from esper.leyline.plain import digest62
from esper.leyline.stages import Stage
from esper.session.batches import Batches, tensors_of
from esper.session.model import StandIn
from esper.tolaria.growth.continuation import Base, Copies, Lessons
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.ranks.world import World

LIMIT = 64 * 2**20  # bytes


def wants_batches(state: RunState, gates: GateConfig) -> bool:
    """Whether a seed may soon be continued on the batches of now: one is in HOLDING, and no copies have theirs yet."""
    if gates.baseline is not Baseline.CONTINUED or (state.continuing is not None and state.continuing.done):
        return False
    return any(entry.stage is Stage.HOLDING for entry in state.slots)


class RecentBatches:
    """Copies of the newest batches, up to `LIMIT` bytes.

    A save lets go of them, so that a session that goes on after it and one that is restored from it judge alike.
    """

    def __init__(self) -> None:
        self._batches: deque[tuple[Any, int]] = deque()

    def __len__(self) -> int:
        return len(self._batches)

    def keep(self, batch: Any, most: int) -> None:
        """Keeps a copy of a batch, and drops the oldest beyond ``most`` batches and `LIMIT` bytes; one always stays."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(batch))
        self._batches.append((copy_inputs(batch), size))
        while len(self._batches) > 1 and (len(self._batches) > most or sum(s for _, s in self._batches) > LIMIT):
            self._batches.popleft()

    def clear(self) -> None:
        """Lets go of all of them."""
        self._batches.clear()

    def take(self) -> list[Any]:
        """Returns them, oldest first, and lets go of them."""
        taken = [batch for batch, _ in self._batches]
        self.clear()
        return taken


class Judging(Protocol):
    """What a continuation needs of the session's evaluator, `esper.session.batches.BatchEvaluator`."""

    world: World
    seed: int
    recent: RecentBatches
    copies: Copies
    scale: Callable[[], float]

    @property
    def probe(self) -> Batches | None:
        """The probe; None without one."""

    @property
    def judge(self) -> Callable[..., tuple[Tensor, Tensor | None]] | None:
        """The per-sample loss of a batch; None if the user gave none."""


def continue_session(
    session: Judging, state: RunState, owner: ParameterOwner, gates: GateConfig, step: int
) -> dict[str, float]:
    """A piece of evidence on whether the help of a seed lasts; this rank's sums, see `Copies.take_piece`.

    Args:
        session: judges batches, and has the newest ones; a continuation that begins takes them.
        state: agreed at the last tick.
        owner: of the network.
        gates: how copies are continued.
        step: optimizer steps done.
    """
    return session.copies.take_piece(state, owner, gates, step, lambda base: _lessons(session, base))


def _lessons(session: Judging, base: Base) -> Lessons:
    """What copies learn from.

    Raises:
        LoopError: there is no probe, no loss, or no batch since the last save.
    """
    part, judge, batches, asked = session.probe, session.judge, session.recent.take(), base.record.continuing
    if part is None or judge is None or not batches:
        raise LoopError("there is no batch of session.loss to continue it on")
    assert asked is not None
    key = ("continued", session.seed, asked.slot, asked.tick)
    units, clusters = part.draw_look(1, 1, session.world.rank, session.world.size, *key)

    def judge_all(grown: Grown) -> Tensor:
        with evaluating(grown.model):
            losses = [judge(StandIn(grown, grown.model), copy_inputs(batch))[0] for batch in part.batches(units)]
        return torch.cat([torch.zeros(0, dtype=torch.float64), *(loss.double().cpu() for loss in losses)])

    return Lessons(
        batch=lambda index: batches[index % len(batches)],
        learn=lambda grown, batch: judge(StandIn(grown, grown.model), copy_inputs(batch))[0],
        judge=judge_all,
        clusters=clusters,
        seed=digest62(list(key)),
        scale=session.scale(),
    )
