"""Takes all ranks back: which generation, how the run is made it again, and what is told of it.

    tick     judged HEALTHY   what lies in memory before it is cleared; at times one more snapshot is taken
             judged PANIC     the same tick, after its commit, on every rank: find a generation -> rebuild -> replay

Every rank comes to the same verdict, in the commit's digest of the agreed state, and holds the same snapshots, since
all took them at the same ticks; so going back to one in memory needs no word between them. Without one in memory (a
run just resumed) the ranks agree on the newest cleared checkpoint that is valid on all of them. What was saved after
the generation is set aside, so that no resume goes on from it: a run killed before, in or after a rollback comes to the
same panic again, and to the same rollback.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from esper.accord.breaker import BreakerOrder, BreakerState, overridden
from esper.accord.config import GovernorConfig
from esper.accord.judge import judge
from esper.accord.replay import Replay, replay
from esper.accord.state import RunState, Terms
from esper.accord.verdict import Symptom, Verdict
from esper.leyline.errors import CheckpointError, DivergedError
from esper.leyline.events.governor import BreakerChanged, Panic, RolledBack, SnapshotTaken
from esper.leyline.events.run import Event, Fault
from esper.tolaria.checkpoint.ring import Generation, Ring
from esper.tolaria.checkpoint.snapshot import read
from esper.tolaria.checkpoint.store import CheckpointStore, rank_file
from esper.tolaria.lockstep.narrate import axes_of
from esper.tolaria.lockstep.wire import Agreed
from esper.tolaria.ranks.handshake import newest_valid_everywhere
from esper.tolaria.ranks.world import World

BUDGET_MS = {"ram": 500.0, "disk": 12_000.0}

# What a rank copies of itself: what is equal on all ranks, and its own.
Collect = Callable[[], tuple[dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Recovery:
    """A generation to go back to, and how the replay differs."""

    generation: Generation
    replay: Replay


class Governor:
    """One rank's governor: the ring, and what was told.

    Args:
        config, terms: of the run. chance: see `esper.accord.verdict.chance_level`. world, store: ranks, checkpoints.
    """

    def __init__(
        self, config: GovernorConfig, *, chance: float, terms: Terms, world: World, store: CheckpointStore
    ) -> None:
        self.config, self.chance, self.terms, self.world, self.store = config, chance, terms, world, store
        self.ring = Ring(config.ring)

    def begin(self, state: RunState, collect: Collect) -> list[Event]:
        """The run begins, or goes on, from a state."""
        return self._take(state, collect)

    def obey(self, state: RunState, order: BreakerOrder, *, begun: bool) -> RunState:
        """The state with the breaker turned as ordered, unless it has obeyed that order already.

        Args:
            begun: the run goes on; one that begins anew takes note of an order from before, and does nothing.
        """
        breaker = state.governor.breaker
        if breaker.obeyed == order.id:
            return state
        if begun:
            breaker = overridden(breaker, order.phase, state.tick, self.config, order.why)
        return replace(state, governor=replace(state.governor, breaker=replace(breaker, obeyed=order.id)))

    def judge(self, state: RunState, sums: dict[str, float], since: int) -> RunState:
        """See `esper.accord.judge.judge`; a healthy tick clears the snapshots before it."""
        state = judge(state, sums, self.terms, self.config, chance=self.chance, since=since)
        if state.governor.verdict is Verdict.HEALTHY:
            self.ring.confirm(state.tick)
        return state

    def keep(self, state: RunState, collect: Collect, *, saved: bool) -> list[Event]:
        """At the end of a tick: takes a snapshot where one is due. A save takes one too, so that a resumed run holds
        what the one before it held."""
        due = saved or state.tick % self.config.snapshot_ticks == 0
        return self._take(state, collect) if due and not state.governor.strikes else []

    def _take(self, state: RunState, collect: Collect) -> list[Event]:
        size, ms = self.ring.take(state, *collect())
        return [SnapshotTaken(**axes_of(state), bytes=size, copy_ms=ms)]

    def recovery(self, present: RunState, *, from_step: int) -> Recovery | None:
        """What to do about a panic; the same on every rank.

        Args:
            present: the state that panicked. from_step: older generations are no choice.

        Returns:
            None: there is nothing to go back to yet, and steps are being skipped, which leaves the weights alone: go
            on, until ``trainer.max_consecutive`` of them end the run.

        Raises:
            DivergedError: there have been too many replays, or there is nothing to go back to.
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
        """The newest checkpoint that a healthy tick after it has confirmed, valid on all ranks."""

        def valid(step: int) -> bool:
            try:
                self.store.verify(step, None if self.world.rank == 0 else ("state.pt", rank_file(self.world.rank)))
                return self.store.manifest(step).tick < present.governor.healthy_tick
            except CheckpointError:
                return False

        steps = [step for step in self.store.steps() if from_step <= step < present.step]
        step = newest_valid_everywhere(self.world, steps, valid)
        return None if step is None else read(self.store, step, self.world)

    def gone_back(self, recovery: Recovery) -> list[Event]:
        """The model is the generation's; what came after it never happened.

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


def told(before: RunState, after: RunState) -> list[Event]:
    """A panic, and a breaker that turned, between two states; on the axes of the second."""
    events: list[Event] = []
    sick = after.governor
    if sick.verdict is Verdict.PANIC:
        events.append(
            Panic(**axes_of(after), symptom=sick.symptom.name, words=sick.words, healthy_step=sick.healthy_step)
        )
    return [*events, *turned(before.governor.breaker, after)]


def turned(old: BreakerState, after: RunState) -> list[Event]:
    """A breaker that is not as it was."""
    new = after.governor.breaker
    if old.turns == new.turns:
        return []
    return [
        BreakerChanged(
            **axes_of(after),
            source=old.phase,
            target=new.phase,
            ticks_left=new.view(after.tick).ticks_left,
            reason=new.why,
            manual=new.manual,
        )
    ]


def rolled_back(present: RunState, recovery: Recovery, began: float) -> list[Event]:
    """What is told of a rollback that is done.

    Args:
        present: the state that panicked. began: clock (`time.perf_counter`) at the verdict.
    """
    generation, how = recovery.generation, recovery.replay
    back = RolledBack(
        **axes_of(present),
        to_step=generation.state.step,
        to_tick=generation.state.tick,
        source=generation.source,
        replay=how.outcome.state.governor.replays,
        blamed=tuple(entry.slot for entry in how.blamed),
        blamed_ticks=tuple(entry.changed_tick for entry in how.blamed),
        skipped_from=0 if how.skip is None else how.skip.first_step,
        skipped_steps=0 if how.skip is None else how.skip.count,
        recovery_ms=1e3 * (time.perf_counter() - began),
        budget_ms=BUDGET_MS[generation.source],
    )
    return [back, *how.outcome.events, *told(present, how.outcome.state)]


def too_many_skipped(state: RunState, agreed: Agreed) -> str:
    """Why a run ends that skipped too many steps in a row."""
    ranks = [str(rank) for rank in agreed.nonfinite_ranks]
    who = f"the loss was not finite on rank {', '.join(ranks)}" if ranks else "no rank's own loss was non-finite"
    return (
        f"diverged: {state.judged_row} optimizer steps in a row had a non-finite host gradient, the last "
        f"before step {state.step}; {who}; lower optim.lr, or resume an earlier checkpoint"
    )
