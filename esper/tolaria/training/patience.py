"""What follows where a metric stops improving: the run ends, or the learning rate is cut.

Both watch a metric that all ranks have agreed on, at each tick that measured it, and count such ticks without an
improvement. So every rank decides alike, without a collective of its own. Their counts lie in every checkpoint.
"""

from typing import Any, Protocol

from esper.accord.state import RunState
from esper.accord.verdict import Verdict
from esper.leyline.errors import CheckpointError, ConfigError
from esper.leyline.events import EarlyStopped, RateCut
from esper.tolaria.growth.config import Schedule
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.growth.policy import Scheduled
from esper.tolaria.lockstep.narrate import Narrator, axes_of
from esper.tolaria.lockstep.observers import Observer, Turn
from esper.tolaria.tasks.task import Task
from esper.tolaria.training.metrics import TaskMetrics
from esper.tolaria.training.precision import Unscaled


class Improvement:
    """The best value of a metric so far, and the ticks since.

    Args:
        metric: as ``validation_loss``.
        higher: whether higher is better.
        least: improvement that counts, in the metric's unit.
    """

    def __init__(self, metric: str, higher: bool, least: float) -> None:
        self.metric, self.higher, self.least = metric, higher, least
        self.best: float | None = None
        self.bad = 0

    def see(self, state: RunState) -> bool:
        """Counts this tick's value; returns whether there was one."""
        reading = state.metric(self.metric)
        if reading.value is None or reading.tick != state.tick:
            return False
        value = reading.value if self.higher else -reading.value
        if self.best is None or value > self.best + self.least:
            self.best, self.bad = value, 0
        else:
            self.bad += 1
        return True

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict`.

        Raises:
            CheckpointError: a field is missing.
        """
        try:
            self.best, self.bad = state["best"], int(state["bad"])
        except KeyError as error:
            raise CheckpointError(f"observers: {error} is missing") from None


class EarlyStop(Observer):
    """Ends the run after ``patience`` measured ticks without an improvement.

    Args:
        improvement: of the metric that is watched.
        patience: ticks.
        narrator: reports.
    """

    name = "early stop"

    def __init__(self, improvement: Improvement, patience: int, narrator: Narrator) -> None:
        self.improvement, self.patience, self.narrator = improvement, patience, narrator

    @property
    def stopped(self) -> bool:  # type: ignore[override]
        """Whether the run is to end."""
        return self.improvement.bad >= self.patience

    def before_commit(self, turn: Turn) -> None:
        """Counts this tick; a tick that panicked does not count."""
        if turn.state.governor.verdict is Verdict.PANIC or not self.improvement.see(turn.state):
            return
        if self.stopped:
            turn.ends = True
            best, metric = self.improvement.best, self.improvement.metric
            value = None if best is None else best if self.improvement.higher else -best
            self.narrator.emit(EarlyStopped(**axes_of(turn.state), metric=metric, best=value, ticks=self.patience))

    def state_dict(self) -> dict[str, Any]:
        """See `Observer.state_dict`."""
        return self.improvement.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Observer.load_state_dict`."""
        self.improvement.load_state_dict(state)


class PlateauCuts(Observer):
    """Cuts the learning rate after so many measured ticks without an improvement, as torch's ReduceLROnPlateau.

    Args:
        improvement: of the metric that is watched.
        owner: has the rates, and the settings.
        narrator: reports.
    """

    name = "plateau"

    def __init__(self, improvement: Improvement, owner: ParameterOwner, narrator: Narrator) -> None:
        self.improvement, self.config, self.owner, self.narrator = improvement, owner.config, owner, narrator
        self.cuts = 0

    def before_commit(self, turn: Turn) -> None:
        """Counts this tick, and cuts the rate of the steps to come."""
        if turn.state.governor.verdict is Verdict.PANIC or not self.improvement.see(turn.state):
            return
        if self.improvement.bad > self.config.plateau_patience:
            self.improvement.bad, self.cuts = 0, self.cuts + 1
            lr = self.config.lr * self._cut()
            self.narrator.emit(RateCut(**axes_of(turn.state), metric=self.improvement.metric, lr=lr))

    def _cut(self) -> float:
        scale = float(self.config.plateau_factor**self.cuts)
        assert isinstance(self.owner.policy, Scheduled)  # a run has built its optimizer
        self.owner.policy.scale = scale
        return scale

    def state_dict(self) -> dict[str, Any]:
        """See `Observer.state_dict`."""
        return {**self.improvement.state_dict(), "cuts": self.cuts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Observer.load_state_dict`."""
        self.improvement.load_state_dict(state)
        self.cuts = int(state["cuts"])
        self._cut()


class Watched(Protocol):
    """What the observers need of the training loop."""

    settings: Any
    task: Task
    owner: ParameterOwner
    narrator: Narrator
    scaling: Unscaled


def watch_run(loop: Watched) -> list[Observer]:
    """The observers that the task and the settings ask for: loss scale, metrics, early stopping, cuts of the rate.

    Raises:
        ConfigError: the metric to watch is none of the task's.
    """
    trainer, optim, info = loop.settings.trainer, loop.owner.config, loop.narrator.task
    found = [*loop.scaling.observers, *([TaskMetrics(loop.task)] if loop.task.metrics else [])]
    watched, plateau = trainer.watch or info.objective, optim.schedule is Schedule.PLATEAU
    higher = info.direction(watched)
    if higher is None and (trainer.patience is not None or plateau):
        raise ConfigError(f"trainer.watch = {watched!r}: the task {info.name} has no such metric")
    if trainer.patience is not None:
        improvement = Improvement(watched, bool(higher), trainer.min_improvement)
        found.append(EarlyStop(improvement, trainer.patience, loop.narrator))
    if plateau:
        improvement = Improvement(watched, bool(higher), trainer.min_improvement)
        found.append(PlateauCuts(improvement, loop.owner, loop.narrator))
    return found
