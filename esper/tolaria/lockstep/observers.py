"""Observers of a tick: governor, saves, and others such as an average of weights, a profiler or alerts.

    after_observe   the sums are agreed and absorbed; the one point at which a governor may change the agreed state
    before_commit   sets what this rank will do and say: digest everything, save after this tick, its word
    after_commit    the decision is agreed, but the model has not followed it yet
    after_follow    the model is what the state says
    after_step      between ticks, after each optimizer step; for those alone that have such a method

Every rank calls the same observers in the same order, which the start handshake compares. So an observer may call a
collective if every rank does, which it must decide by agreed data alone. An observer's state goes into checkpoints.

A caller's observers come first, then saves, then the governor: so a save holds what an observer remembers of its tick,
and an observer sees the tick before the governor has judged it.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from esper.accord.state import RunState
from esper.leyline.errors import CheckpointError
from esper.tolaria.growth.guard import Judgement, StepReport
from esper.tolaria.lockstep.decision import Decision
from esper.tolaria.lockstep.wire import RankWord


@dataclass(slots=True)
class Turn:
    """One tick while it runs."""

    before: RunState
    """The agreed state of the previous tick."""
    state: RunState
    """The agreed state so far in this tick."""
    sums: Mapping[str, float]
    """The reduced observe vector by name."""
    word: RankWord
    """This rank's word in the commit."""
    ends: bool = False
    """The run ends with this tick, before its last step; set in ``before_commit`` on every rank."""
    full: bool = False
    """Digest all parameters and buffers, not only live seeds; the same on every rank."""
    save: bool = False
    """A save comes after this tick, so wrap anew in any case; the same on every rank."""
    decision: Decision | None = None
    """The agreed decision; set from ``after_commit`` on."""
    instead: Callable[[], tuple[RunState, float | None]] | None = None
    """If set in ``after_commit``, runs instead of following the decision; returns the state and ``wrap_ms``."""
    wrap_ms: float | None = None
    """Milliseconds of the wrap; None when there was none."""
    began: float = 0.0
    """Clock (`time.perf_counter`) at its beginning."""

    @property
    def stop(self) -> bool:
        """Whether the run ends after this tick because it was asked to, by a signal or by an order."""
        return self.sums["stop"] > 0 or self.before.steering.stop_tick == self.before.tick + 1

    @property
    def save_ordered(self) -> bool:
        """Whether an order asks for a save after this tick."""
        return self.before.steering.save_tick == self.before.tick + 1

    @property
    def agreed(self) -> Decision:
        """The decision; only from ``after_commit`` on."""
        assert self.decision is not None
        return self.decision


class Observer:
    """Does nothing at every point; a subclass overrides what it needs."""

    name = ""
    """Its name in the handshake, in checkpoints and in errors; unique in a run."""
    stopped = False
    """Whether it ends the run before its last step, from agreed data alone."""
    governs = False
    """Whether it may change the agreed state in ``after_observe``; it must use agreed data alone."""

    def after_observe(self, turn: Turn) -> None:
        """Called once the sums are agreed."""

    def before_commit(self, turn: Turn) -> None:
        """Called before the second collective."""

    def after_commit(self, turn: Turn) -> None:
        """Called once the decision is agreed."""

    def after_follow(self, turn: Turn) -> None:
        """Called once the model has followed."""

    def state_dict(self) -> dict[str, Any]:
        """The state that a resume needs: plain data and tensors, equal on all ranks; empty if it has none."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`."""


class Observers:
    """The observers of one run, in order.

    Raises:
        ValueError: two have the same name, or one has no name.
    """

    def __init__(self, members: Iterable[Observer]) -> None:
        self.members: tuple[Observer, ...] = ()
        self._stepping: list[Callable[[StepReport | Judgement], None]] = []
        for member in members:
            self.add(member)

    def add(self, member: Observer) -> None:
        """Adds one at the end; on every rank alike."""
        names = (*self.names, member.name)
        if "" in names or len(set(names)) < len(names):
            raise ValueError(f"observers need names of their own; these are {', '.join(names)}")
        self.members = (*self.members, member)
        if hasattr(member, "after_step"):
            self._stepping.append(member.after_step)

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(member.name for member in self.members)

    @property
    def ended(self) -> bool:
        """Whether one of them ends the run."""
        return any(member.stopped for member in self.members)

    def after_step(self, report: StepReport | Judgement) -> None:
        """One optimizer step is done on this rank; nothing that decides may come of it, and no collective."""
        for call in self._stepping:
            call(report)

    def call(self, point: str, turn: Turn) -> None:
        """Calls every observer at one point.

        Raises:
            RuntimeError: an observer changed the agreed state, though it may not.
        """
        for member in self.members:
            before = turn.state
            getattr(member, point)(turn)
            if turn.state is not before and not (member.governs and point == "after_observe"):
                raise RuntimeError(f"observer {member.name} changed the agreed state in {point}; only a governor may")

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """The states of those observers that have one, by name."""
        states = {member.name: member.state_dict() for member in self.members}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, dict[str, Any]], where: str) -> None:
        """Restores `state_dict`.

        Args:
            states: by observer's name.
            where: the checkpoint, for an error.

        Raises:
            CheckpointError: an observer has a state that was not saved, or a saved state has no observer.
        """
        present = set(self.state_dict())
        if present != set(states):
            missing, unknown = sorted(present - set(states)), sorted(set(states) - present)
            raise CheckpointError(f"{where}: observers: missing {missing or 'none'}, unknown {unknown or 'none'}")
        for member in self.members:
            if member.name in states:
                member.load_state_dict(states[member.name])
