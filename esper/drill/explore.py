"""Explores every state of a small world, breadth first, under all commands, vetoes and faults.

    explore(World(...), depth=3)      # three ranks, two slots

From each settled state (see `esper.drill.invariants`) every situation of one tick is played by real ranks on a `Bus`:
the shipped cycle, lockstep, encoder, decoder, absorb and reducer, each rank with slots of its own. A state that was
seen before is not entered again. Checked at every tick:

    all ranks hold equal states, or all end with one text, which names the rank that a fault struck
    all ranks entered the same collectives in the same order: two on a healthy tick, three (or more) if ranks part
    stage changes are edges of the table; budgets and looks are never overdrawn; alpha stays in [0, 1]
    a staged birth is registered or discarded within stage_ticks; every slot without a fossil can be emptied again

The first violation ends the exploration; the error says what is wrong and which situations lead there.
"""

import contextlib
import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from esper.accord.config import GateConfig, SlotsConfig
from esper.accord.evidence.plan import ProbePlan
from esper.accord.state import RunState
from esper.drill.bus import Bus, ProtocolBroken, RankEnd, RankWorld
from esper.drill.faults import FaultKind
from esper.drill.invariants import can_empty, find_violations, key_of, settle
from esper.drill.paper_growth import PaperGrowth
from esper.drill.replica import Replica, build_chain, terms_for
from esper.drill.situations import BLUEPRINT, Situation, losses, situations, troubles
from esper.leyline.errors import LockstepError
from esper.leyline.protocols import NullSink
from esper.leyline.stages import Incubation
from esper.tamiyo.scripted import Scripted
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.heartbeat import LOST

T = TypeVar("T")
PROBE = ProbePlan(samples=160, clusters=160, looks=3, reserve=1)  # a look for each of G2, G3, G5, and one for a fossil
CHUNK = 64  # situations that one start of the ranks plays


@dataclass(kw_only=True, slots=True)
class SmallWorld:
    """A world that is small enough to explore.

    Fields:
        ranks: number of ranks.
        slots: number of slots.
        max_live: budget of live seeds; None is unlimited.
        max_germinations: budget of germinations; None is unlimited.
        embargo_ticks: as in a run.
        stage_ticks: as in a run.
    """

    ranks: int = 3
    slots: int = 2
    max_live: int | None = None
    max_germinations: int | None = None
    embargo_ticks: int = 1
    stage_ticks: int = 2


class InvariantBroken(Exception):
    """An invariant does not hold; the text says which, and how to get there."""


@dataclass(slots=True)
class Exploration:
    """The result of an exploration.

    Fields:
        states: distinct states.
        ticks: ticks played.
        faults: faults played.
        levels: states first seen at each depth.
        closed: whether no state was left to enter.
    """

    states: int = 0
    ticks: int = 0
    faults: int = 0
    levels: list[int] = field(default_factory=list)
    closed: bool = False


@dataclass(frozen=True, slots=True)
class _Node:
    state: RunState
    parent: "_Node | None"
    situation: Situation | None

    def way(self) -> str:
        parts: list[str] = []
        node: _Node | None = self
        while node is not None and node.situation is not None:
            parts.insert(0, str(node.situation))
            node = node.parent
        return "; then ".join(parts) or "the beginning"


Outcome = tuple[RunState | str, tuple[str, ...]]  # agreed state or error text, collectives entered


def _chunks(items: Iterable[T], size: int) -> Iterator[list[T]]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


class Explorer:
    """Plays situations of one small world."""

    def __init__(self, small: SmallWorld) -> None:
        self.small = small
        self.grown = [build_chain(small.slots) for _ in range(small.ranks)]
        slots = SlotsConfig(
            incubation=Incubation.SHADOW,
            max_live=small.max_live,
            max_germinations=small.max_germinations,
            embargo_ticks=small.embargo_ticks,
        )
        gates = GateConfig(look_every=1, relook_every=2, first_look=1, min_samples=2, degraded_ticks=1, fossil_every=2)
        self.terms = terms_for(
            self.grown[0].sites, small.ranks, slots, gates, probe=PROBE, tick_steps=2, names=(BLUEPRINT,), max_skips=1
        )
        self.control = ControlConfig(stage_ticks=small.stage_ticks, digest_every=1000)
        self.emptied: set[int] = set()
        self.result = Exploration()

    def explore(self, depth: int, *, with_faults: bool = True, with_losses: bool = False) -> Exploration:
        """Enters every state within ``depth`` ticks of the beginning.

        Args:
            depth: in ticks.
            with_faults: also play the faults that end a run, from each state.
            with_losses: also play the loss of each rank, from each state.

        Raises:
            Broken: see the module.
        """
        root = _Node(settle(RunState(slots=self.terms.first_slots()), self.terms), None, None)
        seen, level = {key_of(root.state)}, [root]
        self.result = Exploration(states=1, levels=[1])
        for _ in range(depth):
            following: list[_Node] = []
            plays = ((node, one) for node in level for one in situations(node.state, self.terms))
            for chunk in _chunks(plays, CHUNK):
                for node, one, outcomes in self._play(chunk):
                    after = self._check_healthy(node, one, outcomes)
                    key = key_of(after)
                    if key not in seen:
                        seen.add(key)
                        following.append(_Node(after, node, one))
            if with_faults:
                self._play_faults(level)
            if with_losses:
                self._play_losses(level)
            level = following
            self.result.levels.append(len(level))
            self.result.states = len(seen)
        self.result.closed = not level
        return self.result

    # playing ------------------------------------------------------------------------------------------------------

    def _play(self, chunk: Sequence[tuple[_Node, Situation]]) -> Iterator[tuple[_Node, Situation, list[Outcome]]]:
        ends = self._run(chunk)
        self.result.ticks += len(chunk)
        for (node, one), *outcomes in zip(chunk, *(rank.value or [] for rank in ends), strict=True):
            yield node, one, outcomes

    def _run(self, chunk: Sequence[tuple[_Node, Situation]]) -> list[RankEnd[list[Outcome]]]:
        def play(world: RankWorld) -> list[Outcome]:
            replica = self._replica(world)
            return [self._tick(world, replica, node.state, one) for node, one in chunk]

        with contextlib.redirect_stderr(io.StringIO()):  # hides the stacks of injected failures
            try:
                ends = Bus(self.small.ranks, seed=self.result.ticks).run(play)
            except ProtocolBroken as error:
                ways = {node.way() for node, _ in chunk}
                raise InvariantBroken(f"{error}; after one of: {' | '.join(sorted(ways))}") from error
        for rank in ends:
            if rank.error is not None:
                raise rank.error
        return ends

    def _replica(self, world: RankWorld) -> Replica:
        grown = self.grown[world.rank]
        controller = Scripted() if world.rank == 0 else None
        return Replica(
            world,
            grown,
            self.terms,
            self.control,
            controller=controller,
            sink=NullSink(),
            growth=PaperGrowth(grown, world, self.terms),
        )

    def _tick(self, world: RankWorld, replica: Replica, state: RunState, one: Situation) -> Outcome:
        growth = replica.growth
        assert isinstance(growth, PaperGrowth)
        growth.jump(state)
        replica.state, replica.step = state, state.step
        if isinstance(replica.controller, Scripted):
            replica.controller.commands = one.commands
        entered = len(world.calls)
        try:
            values = {**one.every, **one.values.get(world.rank, {})}
            result: RunState | str = replica.tick(fault=one.fault, vetoes=one.vetoes.get(world.rank), **values)
        except LockstepError as error:
            result = str(error)
        return result, tuple(world.calls[entered:])

    # judging ------------------------------------------------------------------------------------------------------

    def _blame(self, node: _Node, one: Situation, text: str) -> InvariantBroken:
        return InvariantBroken(f"{text}; after {node.way()}; then {one}")

    def _check_alike(self, node: _Node, one: Situation, outcomes: list[Outcome]) -> RunState | str:
        result, calls = outcomes[0]
        for rank, (other, others) in enumerate(outcomes):
            if others != calls:
                raise self._blame(node, one, f"rank 0 entered {calls}, rank {rank} {others}")
            if other != result:
                raise self._blame(node, one, f"rank 0 has {result}, rank {rank} {other}")
        parted = isinstance(result, str)
        usual = tuple(call for call in calls if call != "tensors")  # the digests of single tensors, where some differ
        if usual != (("observe", "commit", "diagnosis") if parted else ("observe", "commit")):
            raise self._blame(node, one, f"all ranks entered {calls}, and came to {result}")
        return result

    def _check_healthy(self, node: _Node, one: Situation, outcomes: list[Outcome]) -> RunState:
        result = self._check_alike(node, one, outcomes)
        if isinstance(result, str):
            raise self._blame(node, one, f"a healthy tick ended with: {result}")
        stage_ticks = self.small.stage_ticks
        if violations := find_violations(node.state, result, self.terms, stage_ticks):
            raise self._blame(node, one, "; ".join(violations))
        after = settle(result, self.terms)
        if not can_empty(after, self.terms, stage_ticks, self.emptied):
            raise self._blame(node, one, "a slot cannot be emptied again")
        return after

    def _play_faults(self, level: list[_Node]) -> None:
        plays = ((node, one) for node in level for one in troubles(node.state, self.terms))
        for chunk in _chunks(plays, CHUNK):
            for node, one, outcomes in self._play(chunk):
                self.result.faults += 1
                result, fault = self._check_alike(node, one, outcomes), one.fault
                assert fault is not None
                if not isinstance(result, str) or f"rank {fault.rank}" not in result:
                    raise self._blame(node, one, f"not told as what it is: {result}")

    def _play_losses(self, level: list[_Node]) -> None:
        for node in level:
            for one in losses(node.state, self.terms):
                self.result.faults += 1
                self._lose(node, one)

    def _lose(self, node: _Node, one: Situation) -> None:
        """Loses a rank; the others must end at the next collective, all alike, and name it."""
        fault, calm = one.fault, Situation()
        assert fault is not None

        def play(world: RankWorld) -> None:
            replica = self._replica(world)
            growth = replica.growth
            assert isinstance(growth, PaperGrowth)
            growth.jump(node.state)
            replica.state, replica.step = node.state, node.state.step
            for situation in (one, calm):
                replica.tick(fault=situation.fault)

        ends = Bus(self.small.ranks, seed=self.result.faults).run(play)
        calls = {tuple(rank.calls) for number, rank in enumerate(ends) if number != fault.rank}
        after = ("observe", "commit", "observe")
        wanted = {
            FaultKind.LOST_BEFORE_OBSERVE: after[:1],
            FaultKind.LOST_BEFORE_COMMIT: after[:2],
            FaultKind.LOST_AFTER_COMMIT: after,
        }[fault.kind]
        for number, rank in enumerate(ends):
            if number == fault.rank:
                continue
            text = str(rank.error)
            named = isinstance(rank.error, LockstepError) and text.startswith(LOST) and f"rank {fault.rank} " in text
            if not named or calls != {wanted}:
                raise self._blame(node, one, f"rank {number} entered {rank.calls} and ended with {rank.error!r}")


def explore(small: SmallWorld, depth: int, *, with_losses: bool = False) -> Exploration:
    """Explores one small world; see `Explorer.explore`."""
    return Explorer(small).explore(depth, with_losses=with_losses)
