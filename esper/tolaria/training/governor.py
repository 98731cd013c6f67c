"""Takes all ranks back after a panic: chooses a generation, restores it and reports the rollback.

    tick     judged HEALTHY   earlier snapshots in memory are cleared; at some ticks a new one is taken
             judged PANIC     in the same tick, after its commit, on every rank: find a generation -> rebuild -> replay

Every rank comes to the same verdict, which the commit's digest of the agreed state checks, and holds the same
snapshots, since all took them at the same ticks. So going back to one in memory needs no communication. Without one in
memory (a run just resumed) the ranks agree on the newest cleared checkpoint that is valid on all of them. Checkpoints
after the generation are set aside, so that no resume goes on from them: a run killed before, in or after a rollback
comes to the same panic again, and to the same rollback.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from esper.accord.breaker import BreakerOrder, after_order
from esper.accord.governor.config import GovernorConfig
from esper.accord.judge import judge_tick
from esper.accord.replay import Replay, replay
from esper.accord.state import RunState, Terms
from esper.accord.verdict import Symptom, Verdict
from esper.leyline.errors import CheckpointError, DivergedError
from esper.leyline.events import Event, Fault, RolledBack, SnapshotTaken
from esper.tolaria.checkpoint.ring import Generation, Ring
from esper.tolaria.checkpoint.shared import share_places
from esper.tolaria.checkpoint.snapshot import read_generation, share_of
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.lockstep.narrate import Narrator, axes_of, trouble_events
from esper.tolaria.lockstep.observers import Observer, Turn
from esper.tolaria.lockstep.tick import Marks
from esper.tolaria.lockstep.wire import Agreed
from esper.tolaria.ranks.handshake import newest_valid_everywhere
from esper.tolaria.ranks.memory import free_bytes
from esper.tolaria.ranks.world import World

MIB = 2**20
BUDGET_MS = {"ram": 500.0, "disk": 12_000.0}

# From a state to everything of the run: what is equal on all ranks, and what is this rank's own.
Collect = Callable[[RunState], tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Recovery:
    """A generation to go back to, and how the replay differs."""

    generation: Generation
    replay: Replay


class Governor:
    """One rank's governor, which holds the ring of snapshots.

    Args:
        config: its settings.
        chance: loss of guessing, see `esper.accord.verdict.chance_level`.
        terms: of the run.
        world: the ranks.
        store: the checkpoints on disk.
    """

    def __init__(
        self, config: GovernorConfig, *, chance: float, terms: Terms, world: World, store: CheckpointStore
    ) -> None:
        self.config, self.chance, self.terms, self.world, self.store = config, chance, terms, world, store
        self.ring = Ring(config.ring)
        self.apart: Callable[[], Iterable[str]] = tuple  # names of the buffers that each rank may fill by itself

    def begin(self, state: RunState, collect: Collect) -> list[Event]:
        """Takes the first snapshot, as the run begins or goes on from a state; a fault if there is no room for all."""
        self.ring = Ring(self.config.ring, share_places(self.world, self.config.ring))
        return [*self._take(state, collect), *self._find_no_room(state)]

    def _find_no_room(self, state: RunState) -> list[Event]:
        """A fault on the first rank of a machine whose memory cannot hold the snapshots that are still to come."""
        free, ranks = free_bytes(torch.device("cpu")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        shared = self.ring.bytes - self.ring.own_bytes
        need = (self.config.ring - 1) * (ranks * self.ring.own_bytes + shared)
        if free is None or need <= free or self.world.local_rank != 0:
            return []
        what = (
            f"governor.ring = {self.config.ring}: its snapshots take {need // MIB} MiB more for the {ranks} ranks of "
            f"this machine{', which share them' if self.ring.shares else ''}; it has {free // MIB} MiB free; set "
            "governor.ring=2, or fewer ranks a machine"
        )
        return [Fault(**axes_of(state), what=what, where=f"rank {self.world.rank}")]

    def obey(self, state: RunState, order: BreakerOrder, *, begun: bool) -> RunState:
        """The state with the breaker set as ordered, unless it has obeyed that order already.

        Args:
            state: the agreed state.
            order: the order that every rank has read.
            begun: whether the run goes on; a new run only notes an order that is older than itself.
        """
        breaker = state.governor.breaker
        if breaker.obeyed == order.id:
            return state
        if begun:
            breaker = after_order(breaker, order.phase, state.tick, self.config.cool_ticks, order.why)
        return replace(state, governor=replace(state.governor, breaker=replace(breaker, obeyed=order.id)))

    def judge(self, state: RunState, sums: Mapping[str, float], since: int) -> RunState:
        """Judges a tick by `esper.accord.judge.judge_tick`; a healthy tick clears the snapshots before it."""
        state = judge_tick(state, sums, self.terms, self.config, chance=self.chance, since=since)
        if state.governor.verdict is Verdict.HEALTHY:
            self.ring.confirm(state.tick)
        return state

    def keep(self, state: RunState, collect: Collect, *, saved: bool) -> list[Event]:
        """Takes a snapshot at the end of a tick, if one is due.

        A save takes one too, so that a resumed run holds the same snapshots as the run before it.
        """
        due = saved or state.tick % self.config.snapshot_ticks == 0
        return self._take(state, collect) if due and not state.governor.strikes else []

    def _take(self, state: RunState, collect: Collect) -> list[Event]:
        size, ms = self.ring.take(state, *collect(state), apart=frozenset(self.apart()))
        return [SnapshotTaken(**axes_of(state), bytes=size, copy_ms=ms)]

    def find_recovery(self, present: RunState, *, from_step: int) -> Recovery | None:
        """Finds the generation to go back to after a panic; the same on every rank.

        Args:
            present: the state that panicked.
            from_step: optimizer step before which no generation is chosen.

        Returns:
            The recovery. None if there is no generation yet and steps are being skipped, which leaves the weights
            alone: the run then goes on, until ``trainer.max_consecutive`` of them end it.

        Raises:
            DivergedError: there were too many replays, or there is no generation to go back to.
        """
        sick = present.governor
        if sick.replays >= self.config.max_replays:
            raise DivergedError(
                f"{sick.words}; after {sick.replays} replays (governor.max_replays) it came to this again; lower "
                "optim.lr, or look at the data and the seeds named by the rollbacks"
            )
        generation = self.ring.newest(sick.replays + 1, from_step=from_step) or self._from_disk(present, from_step)
        if generation is not None:
            return Recovery(generation, replay(present, generation.state, self.terms, self.config))
        if sick.symptom is Symptom.NONFINITE and present.judged_row > 0:
            return None
        raise DivergedError(
            f"{sick.words}; there is no cleared snapshot to go back to; lower optim.lr, or resume an earlier checkpoint"
        )

    def _from_disk(self, present: RunState, from_step: int) -> Generation | None:
        """The newest checkpoint that a later healthy tick has confirmed and that is valid on all ranks, or None."""

        def valid(step: int) -> bool:
            try:
                self.store.verify(step, share_of(self.world.rank, self.world.local_rank))
                return self.store.manifest(step).tick < present.governor.healthy_tick
            except CheckpointError:
                return False

        steps = [step for step in self.store.steps() if from_step <= step < present.step]
        step = newest_valid_everywhere(self.world, steps, valid)
        return None if step is None else read_generation(self.store, step, self.world)

    def discard_later(self, recovery: Recovery) -> list[Event]:
        """Drops the snapshots and sets aside the checkpoints after a generation, once the model is back at it.

        Returns:
            A fault if checkpoints could not be set aside.

        Raises:
            LeaseError: on rank 0, a newer attempt has begun.
        """
        state = recovery.generation.state
        self.ring.forget_after(state.step)
        if self.world.rank != 0:
            return []
        try:
            self.store.set_aside(state.step)
        except OSError as error:
            what = f"checkpoints after step {state.step} cannot be set aside ({error.strerror}); a resume may use one"
            return [Fault(**axes_of(state), what=what, where=str(self.store.folder))]
        return []


def rollback_events(present: RunState, recovery: Recovery, began: float) -> list[Event]:
    """The events of a rollback that is done.

    Args:
        present: the state that panicked.
        recovery: the generation, and how the replay differs.
        began: clock (`time.perf_counter`) at the verdict.
    """
    generation, changes = recovery.generation, recovery.replay
    rollback = RolledBack(
        **axes_of(present),
        to_step=generation.state.step,
        to_tick=generation.state.tick,
        source=generation.source,
        replay=changes.outcome.state.governor.replays,
        blamed=tuple(entry.slot for entry in changes.blamed),
        blamed_ticks=tuple(entry.changed_tick for entry in changes.blamed),
        skipped_from=0 if changes.skip is None else changes.skip.first_step,
        skipped_steps=0 if changes.skip is None else changes.skip.count,
        recovery_ms=1e3 * (time.perf_counter() - began),
        budget_ms=BUDGET_MS[generation.source],
    )
    return [rollback, *changes.outcome.events, *trouble_events(present, changes.outcome.state)]


def explain_skips(state: RunState, agreed: Agreed) -> str:
    """The error text of a run that skipped too many steps in a row."""
    ranks = [str(rank) for rank in agreed.nonfinite_ranks]
    who = f"the loss was not finite on rank {', '.join(ranks)}" if ranks else "no rank's own loss was non-finite"
    return (
        f"diverged: {state.judged_row} optimizer steps in a row had a non-finite host gradient, the last "
        f"before step {state.step}; {who}; lower optim.lr, or resume an earlier checkpoint"
    )


class GovernorObserver(Observer):
    """Judges each tick, takes all ranks back after a panic, and takes snapshots.

    Args:
        governor: of this rank.
        settle_saves: settles every save on all ranks together, so that none is committed after the rollback.
        narrator: reports.
        marks: marks where this rank is.
        collect: returns everything of the run in a state.
        go_back: takes the run back; from the state that panicked, the recovery, and the clock at the verdict.
        from_step: returns the optimizer step before which no generation is chosen.
    """

    name, governs = "governor", True

    def __init__(
        self,
        governor: Governor,
        *,
        settle_saves: Callable[[RunState], None],
        narrator: Narrator,
        marks: Marks,
        collect: Collect,
        go_back: Callable[[RunState, Recovery, float], tuple[RunState, float | None]],
        from_step: Callable[[], int],
    ) -> None:
        self.governor, self.settle_saves, self.narrator, self.marks = governor, settle_saves, narrator, marks
        self.collect, self.go_back, self.from_step = collect, go_back, from_step

    def after_observe(self, turn: Turn) -> None:
        """Adds this tick's verdict to the state. During a replay, all parameters are digested."""
        turn.state = self.governor.judge(turn.state, turn.sums, turn.before.step)
        turn.full |= turn.state.governor.replays > 0

    def after_commit(self, turn: Turn) -> None:
        """After a panic, makes the tick go back instead of following its decision, if there is a generation."""
        if turn.state.governor.verdict is not Verdict.PANIC:
            return
        judged = time.perf_counter()
        self.marks.mark("rollback")
        self.governor.world.allow_slow(True)
        self.settle_saves(turn.state)
        recovery = self.governor.find_recovery(turn.state, from_step=self.from_step())
        if recovery is not None:
            # Later checkpoints are set aside, and there may be no other: save at once.
            turn.save = True
            turn.instead = partial(self.go_back, turn.state, recovery, judged)

    def after_follow(self, turn: Turn) -> None:
        """Takes a snapshot if one is due; not after a rollback, whose generation is one itself."""
        if turn.instead is None:
            self.narrator.emit_all(self.governor.keep(turn.state, self.collect, saved=turn.save))
