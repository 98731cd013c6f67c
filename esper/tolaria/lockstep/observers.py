"""What may stand around a tick: governor, saves, an average of weights, a profiler, alerts.

    after_observe   the sums are agreed and taken in; the one point at which a governor may change the agreed state
    before_commit   what this rank will say: digest everything, save afterwards, its word
    after_commit    the decision is agreed, and nothing of it has happened to the model yet
    after_follow    the model is what the state says

Every rank calls the same observers in the same order, which the start handshake compares. So an observer may call a
collective, if it does so on every rank alike, by what is agreed. What one remembers goes into every checkpoint.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from esper.accord.state import RunState
from esper.leyline.errors import CheckpointError
from esper.tolaria.lockstep.decision import Decision
from esper.tolaria.lockstep.wire import RankWord


@dataclass(slots=True)
class Turn:
    """One tick on its way."""

    before: RunState
    """The agreed state of the tick before."""
    state: RunState
    """The agreed state as far as this tick has come."""
    sums: Mapping[str, float]
    """The reduced observe vector by name."""
    word: RankWord
    """What this rank says in the commit."""
    full: bool = False
    """Digest all parameters and buffers, not live seeds alone; the same on every rank."""
    save: bool = False
    """A save comes after this tick, so wrap anew in any case; the same on every rank."""
    decision: Decision | None = None
    """What was agreed, from ``after_commit`` on."""
    instead: Callable[[], tuple[RunState, float | None]] | None = None
    """Set in ``after_commit``: runs in the place of following the decision, and returns as that does."""
    wrap_ms: float | None = None
    """Milliseconds of the wrap; None when there was none."""

    @property
    def agreed(self) -> Decision:
        """The decision, once there is one."""
        assert self.decision is not None
        return self.decision


class Observer:
    """Does nothing at every point; a kind of observer overrides what it needs."""

    name = ""
    """What the handshake, a checkpoint and an error call it; unique in a run."""
    governs = False
    """It may change the agreed state in ``after_observe``, by what is agreed alone."""

    def after_observe(self, turn: Turn) -> None:
        """The sums are agreed."""

    def before_commit(self, turn: Turn) -> None:
        """Before the second collective."""

    def after_commit(self, turn: Turn) -> None:
        """The decision is agreed."""

    def after_follow(self, turn: Turn) -> None:
        """The model has followed."""

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs: plain data and tensors, equal on all ranks; empty for one that remembers nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes `state_dict` back."""


class Observers:
    """The observers of one run, in their one order.

    Raises:
        ValueError: two of one name, or one without.
    """

    def __init__(self, members: Iterable[Observer]) -> None:
        self.members = tuple(members)
        names = self.names
        if "" in names or len(set(names)) < len(names):
            raise ValueError(f"observers need names of their own; these are {', '.join(names)}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(member.name for member in self.members)

    def call(self, point: str, turn: Turn) -> None:
        """Calls every observer at one point.

        Raises:
            RuntimeError: one that may not has changed the agreed state.
        """
        for member in self.members:
            before = turn.state
            getattr(member, point)(turn)
            if turn.state is not before and not (member.governs and point == "after_observe"):
                raise RuntimeError(f"observer {member.name} changed the agreed state in {point}; only a governor may")

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """By name, what those hold that remember something."""
        states = {member.name: member.state_dict() for member in self.members}
        return {name: state for name, state in states.items() if state}

    def load_state_dict(self, states: Mapping[str, dict[str, Any]], where: str) -> None:
        """Takes `state_dict` back.

        Raises:
            CheckpointError: an observer remembers something that was not saved, or the other way round.
        """
        mine = set(self.state_dict())
        if mine != set(states):
            missing, unknown = sorted(mine - set(states)), sorted(set(states) - mine)
            raise CheckpointError(f"{where}: observers: missing {missing or 'none'}, unknown {unknown or 'none'}")
        for member in self.members:
            if member.name in states:
                member.load_state_dict(states[member.name])
