"""Decides when a run saves, and reports its saves; `esper.tolaria.checkpoint.saver` copies and writes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from esper.accord.state import RunState
from esper.accord.verdict import Verdict
from esper.leyline.events.task import TaskInfo
from esper.leyline.protocols import EventSink
from esper.tolaria.checkpoint.saver import Saver
from esper.tolaria.lockstep.narrate import Narrator, axes_of
from esper.tolaria.lockstep.observers import Observer, Turn
from esper.tolaria.lockstep.tick import Marks
from esper.tolaria.lockstep.wire import SaveWord
from esper.tolaria.ranks.config import ControlConfig


class Saves(Observer):
    """The saves of one run.

    Args:
        saver: writes them.
        narrator: reports them.
        heartbeat: marks where this rank is.
        sink: flushed before a save is committed.
        control: time limits.
        task: its objective scores a save.
        every_ticks: ticks between saves; 0 saves at the end alone.
        total_steps: optimizer steps of the run.
        collect: returns everything of the run in a state.
    """

    name = "saves"

    def __init__(
        self,
        saver: Saver,
        narrator: Narrator,
        heartbeat: Marks,
        sink: EventSink,
        control: ControlConfig,
        task: TaskInfo,
        *,
        every_ticks: int,
        total_steps: int,
        collect: Callable[[RunState], tuple[dict[str, Any], dict[str, Any]]],
    ) -> None:
        self.saver, self.narrator, self.heartbeat, self.sink = saver, narrator, heartbeat, sink
        self._task, self._patience = task, control.startup_timeout_s / 2
        self.every_ticks, self._total, self._collect = every_ticks, total_steps, collect
        self._due = self._last = False

    def before_commit(self, turn: Turn) -> None:
        """Decides whether a save follows this tick: by count, at the end, or because a stop or a save was requested."""
        stop, ended = turn.stop, turn.ends or turn.state.step >= self._total
        self._due = ended or (self.every_ticks > 0 and turn.state.tick % self.every_ticks == 0)
        self._last = stop or ended
        turn.save = self._due or stop or turn.save_ordered
        if turn.save:  # the previous save must be done; every rank waits for its own share
            self.saver.wait()
            turn.full = True
        turn.word = replace(turn.word, save=self.saver.word)

    def after_commit(self, turn: Turn) -> None:
        """Settles the save in flight, and checks whether another can begin."""
        self.heartbeat.mark("save-commit")
        self.flush_before_commit()
        self.narrator.emit_all(self.saver.settle(turn.agreed.agreed.ranks, axes_of(turn.state)))
        if turn.state.governor.verdict is not Verdict.PANIC:  # after a panic the governor settles them all
            turn.save = turn.save and self.make_room(turn.state, last=self._last)

    def after_follow(self, turn: Turn) -> None:
        """Begins the save."""
        if turn.save:
            self.heartbeat.mark("save")
            scored = self._due or turn.instead is not None  # a stop here must not change what validation chooses
            self.begin(turn.state, scored=scored)

    def objective(self, state: RunState) -> float | None:
        """The validation metric that a sweep optimises."""
        return state.metric(self._task.objective).value

    def begin(self, state: RunState, *, scored: bool) -> None:
        """Begins a save of the state at the end of a tick; a later commit settles it.

        Args:
            state: at the end of the tick.
            scored: whether validation may choose it for the test. A save that only a stop or an order requested has no
                score, so that such a run chooses among the same checkpoints as one that nobody asked.
        """
        value, fresh = self.objective(state), state.validation_loss.tick == state.tick
        score = None
        if scored and value is not None and fresh:
            score = value if self._task.higher else -value
        common, own = self._collect(state)
        self.saver.begin(state.step, state.tick, score, common if self.saver.world.rank == 0 else None, own)

    def make_room(self, state: RunState, *, last: bool) -> bool:
        """Whether a save can begin. If the previous one is still being written, all ranks know it from the same commit:
        the last save of a run waits for it, any other is left out."""
        previous = self.saver.in_flight
        if previous is None:
            return True
        if last:
            self.settle_now(state)
            return True
        what = (
            f"save of step {state.step} left out: that of step {previous} is still being written; is the disk slow? "
            "raise checkpoint.every_ticks"
        )
        self.narrator.report_fault(state, what, str(self.saver.store.path(state.step)))
        return False

    def settle_now(self, state: RunState) -> None:
        """Waits on all ranks together until nothing is being written or committed."""
        self.narrator.emit_all(self.saver.drain(axes_of(state), self._patience))

    def finish(self, state: RunState) -> None:
        """Settles the last save, synchronously."""
        self.heartbeat.mark("save-commit")
        self.sink.flush()
        self.narrator.emit_all(self.saver.finish(axes_of(state), self._patience))

    def flush_before_commit(self) -> None:
        """Writes the events up to a saved tick first: a resume from there does not produce them again."""
        if self.saver.word in (SaveWord.WRITTEN, SaveWord.FAILED):
            self.sink.flush()
