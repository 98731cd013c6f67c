"""A crowd that falls ill: the shipped governor, rollback and saver on ranks without a network.

    run_guarded(GuardedCrowd(ranks=8, sick=(20,), fault=GuardFault.SNAPSHOT), folder)

Each rank is a `Replica` with the observers of a run: saves, and a governor with a ring of snapshots. Its weights are
moved by each tick, equally on all ranks, so that a rollback shows in them. At the times in ``sick`` the training losses
of all ranks blow up, more and more, until they have gone back. The ranks write real checkpoints into one folder, as
ranks of one machine do.
"""

import errno
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch

from esper.accord.governor.config import GovernorConfig
from esper.accord.state import RunState, Terms
from esper.accord.verdict import Verdict
from esper.drill.bus import Bus, Lost, RankEnd
from esper.drill.crowd import Crowd, EventList, Setting
from esper.drill.replica import Replica, build_chain
from esper.kasmina.slots.grown import Grown
from esper.leyline.events import Event
from esper.leyline.events.task import OF_SESSION
from esper.leyline.plain import digest62
from esper.leyline.protocols import Controller, EventSink, NullSink
from esper.tamiyo.random import RandomConfig, RandomController
from esper.tolaria.checkpoint import snapshot
from esper.tolaria.checkpoint.ring import Ring
from esper.tolaria.checkpoint.saver import Saver
from esper.tolaria.checkpoint.saves import Saves
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.lockstep.ema import WeightAverage
from esper.tolaria.lockstep.observers import Observer, Turn
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.world import World
from esper.tolaria.training.going_back import go_back
from esper.tolaria.training.governor import Governor, Recovery
from esper.tolaria.training.observing import build_observers

CHANCE = 50.0  # nats; healthy losses are 1 to 9
BLOWN_UP, GROWTH = 10_000.0, 4.0  # nats, and how much more at each tick
MOVE = 2.0**-10  # of each weight, at each tick; exact in float32


class GuardFault(StrEnum):
    """The faults of one rank around the first rollback."""

    LOST = "lost in the rollback"
    SNAPSHOT = "forged snapshot"
    DISK = "its disk is full, from the first save to the rollback"
    MEMORY = "no snapshot in memory, on all ranks"


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardedCrowd:
    """Settings.

    Fields:
        ranks: number of ranks.
        slots: number of slots.
        ticks: number of ticks, those of the time that never was included.
        sick: how many ticks have been taken when the losses blow up.
        every: ticks between saves.
        seed: decides commands, losses, and the rank of the fault.
        fault: strikes one rank; None for none.
    """

    ranks: int = 4
    slots: int = 3
    ticks: int = 40
    sick: tuple[int, ...] = (20,)
    every: int = 3
    seed: int = 0
    fault: GuardFault | None = None

    @property
    def struck(self) -> int:
        """The rank that the fault strikes."""
        return random.Random(f"{self.seed}/struck").randrange(self.ranks)


@dataclass(frozen=True, slots=True)
class Moment:
    """One rank after one tick.

    Fields:
        state: digest of the agreed record.
        step: optimizer steps done.
        weights: sum of each parameter of the model.
        panicked: whether the tick went back.
    """

    state: int
    step: int
    weights: dict[str, float]
    panicked: bool


@dataclass(frozen=True, slots=True)
class GuardedLife:
    """The result of a rank that reached the end: a moment for each tick, and its events."""

    moments: tuple[Moment, ...]
    events: tuple[Event, ...]


class _FullDisk(CheckpointStore):
    """A store that cannot write while its disk is full."""

    full = True

    def write(self, step: int, name: str, payload: dict[str, Any]) -> None:
        """Writes, or raises what a full disk does."""
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().write(step, name, payload)


class Guarded(Replica):
    """A replica with saves and a governor.

    Args:
        world: its place on the bus.
        grown: its own model.
        terms: the same on all ranks.
        setup: of the crowd.
        folder: RUN.
        controller: on rank 0, None elsewhere.
        sink: takes the events.
    """

    average: WeightAverage | None = None
    governor: Governor | None

    def __init__(
        self,
        world: World,
        grown: Grown,
        terms: Terms,
        setup: GuardedCrowd,
        folder: Path,
        *,
        controller: Controller | None,
        sink: EventSink,
    ) -> None:
        self.setup, self.panicked = setup, False
        self.here = setup.fault if world.rank == setup.struck else None
        self.store = (_FullDisk if self.here is GuardFault.DISK else CheckpointStore)(
            folder / "checkpoints", attempt=1, keep=3
        )
        self.saver = Saver(self.store, world)
        config = GovernorConfig(min_history=4, snapshot_ticks=2, embargo_ticks=4, cool_ticks=2)
        governor = self.governor = Governor(config, chance=CHANCE, terms=terms, world=world, store=self.store)
        super().__init__(
            world, grown, terms, ControlConfig(digest_every=2), controller=controller, sink=sink, seed=setup.seed
        )
        self.narrator.emit_all(governor.begin(self.state, self.collect))

    def build_observers(self) -> Sequence[Observer]:
        """Those of a run, behind the drill's own."""
        self.saves = Saves(
            self.saver,
            self.narrator,
            self.heartbeat,
            self.sink,
            self.control,
            OF_SESSION,
            every_ticks=self.setup.every,
            total_steps=self.terms.total_steps,
            collect=self.collect,
        )
        return build_observers(self, self.saves, self.governor, [*super().build_observers(), _StrikeInRollback(self)])

    def collect(self, state: RunState) -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything of this rank in a state, as the engine collects it."""
        identity = snapshot.Identity(config_digest=0, settings={}, run_id="drill", teacher=None)
        controller = {} if self.controller is None else self.controller.state_dict()
        common = snapshot.collect_common(self.grown, self.owner, state, controller, identity, {})
        return common, snapshot.collect_own(self.world)

    def go_back(self, present: RunState, recovery: Recovery, began: float) -> tuple[RunState, float | None]:
        """As in a run."""
        return go_back(self, present, recovery, began)

    def oldest_step(self) -> int:
        """As in a run without a teacher."""
        return 0

    def live(self) -> GuardedLife:
        """Takes all ticks."""
        moments, ill, loss = [], False, BLOWN_UP
        for taken in range(self.setup.ticks):
            with torch.no_grad():
                for parameter in self.grown.model.parameters():
                    parameter.add_(MOVE)
            ill, self.panicked = ill or taken in self.setup.sick, False
            if ill:
                loss *= GROWTH
                self.tick(train_loss=8 * loss, train_loss_sq=8 * loss**2)
            else:
                self.tick()
            if self.panicked:
                ill, loss = False, BLOWN_UP
            weights = {name: tensor.double().sum().item() for name, tensor in self.grown.model.named_parameters()}
            moments.append(Moment(digest62(self.state), self.step, weights, self.panicked))
        self.saves.finish(self.state)
        return GuardedLife(tuple(moments), tuple(self.sink.events) if isinstance(self.sink, EventList) else ())


class _StrikeInRollback(Observer):
    """Strikes a rank in the commit of the tick that goes back, before the governor does."""

    name = "strike in rollback"

    def __init__(self, replica: Guarded) -> None:
        self.replica = replica

    def after_commit(self, turn: Turn) -> None:
        """Notes the panic, and strikes if it is this rank's turn."""
        if turn.state.governor.verdict is not Verdict.PANIC:
            return
        self.replica.panicked = True
        governor = self.replica.governor
        assert governor is not None
        if self.replica.setup.fault is GuardFault.MEMORY:
            governor.ring = Ring(governor.config.ring)
        if self.replica.here is GuardFault.LOST:
            raise Lost
        if self.replica.here is GuardFault.SNAPSHOT:
            generation = governor.ring.newest(1)
            assert generation is not None
            with torch.no_grad():
                next(iter(generation.common["model"].values())).view(-1)[0] += 1e-3
        if isinstance(self.replica.store, _FullDisk):
            self.replica.store.full = False  # somebody makes room


def run_guarded(setup: GuardedCrowd, folder: Path) -> list[RankEnd[GuardedLife]]:
    """Runs a crowd that falls ill; returns the end of each rank.

    Args:
        setup: the crowd.
        folder: an empty folder for its checkpoints.

    Raises:
        ProtocolBroken: ranks did not enter the same collectives.
    """
    setting = Setting(Crowd(ranks=setup.ranks, slots=setup.slots))

    def live(world: World) -> GuardedLife:
        sink = EventList() if world.rank == 0 else NullSink()
        controller = RandomController(RandomConfig(rate=0.5, max_ticks=2), slots=tuple(setting.sites), seed=setup.seed)
        replica = Guarded(
            world,
            build_chain(setup.slots, setting.sites),
            setting.terms,
            setup,
            folder,
            controller=controller if world.rank == 0 else None,
            sink=sink,
        )
        try:
            return replica.live()
        finally:
            replica.saver.close()

    return Bus(setup.ranks, seed=setup.seed).run(live)
