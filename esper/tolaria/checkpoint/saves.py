"""When a run saves, and what it says of it; the copying and writing is `esper.tolaria.checkpoint.saver`'s."""

from collections.abc import Callable
from typing import Any

from esper.accord.state import RunState
from esper.leyline.protocols import EventSink
from esper.tolaria.checkpoint.config import Objective
from esper.tolaria.checkpoint.saver import Saver
from esper.tolaria.lockstep.narrate import Narrator, axes_of
from esper.tolaria.lockstep.wire import SaveWord
from esper.tolaria.ranks.config import ControlConfig
from esper.tolaria.ranks.heartbeat import Heartbeat


class Saves:
    """The saves of one run.

    Args:
        saver: writes them. narrator, heartbeat, sink: tell of them. control: limits. objective: what scores them.
    """

    def __init__(
        self,
        saver: Saver,
        narrator: Narrator,
        heartbeat: Heartbeat,
        sink: EventSink,
        control: ControlConfig,
        objective: Objective,
    ) -> None:
        self.saver, self.narrator, self.heartbeat, self.sink = saver, narrator, heartbeat, sink
        self._by, self._patience = objective, control.startup_timeout_s / 2

    def objective(self, state: RunState) -> float | None:
        """The validation metric that a sweep optimises."""
        accuracy = self._by is Objective.VALIDATION_ACCURACY
        return (state.validation_accuracy if accuracy else state.validation_loss).value

    def begin(
        self, state: RunState, collect: Callable[[], tuple[dict[str, Any], dict[str, Any]]], *, rank: int, scored: bool
    ) -> None:
        """Begins a save of the state at the end of a tick; its fate is told in a later commit.

        ``scored`` is whether validation may choose it for the test: a save that only a stop asked for has no score, so
        that a run which was stopped chooses among the same checkpoints as one which was not.
        """
        value, fresh = self.objective(state), state.validation_loss.tick == state.tick
        score = None
        if scored and value is not None and fresh:
            score = value if self._by is Objective.VALIDATION_ACCURACY else -value
        common, own = collect()
        self.saver.begin(state.step, state.tick, score, common if rank == 0 else None, own)

    def room(self, state: RunState, *, last: bool) -> bool:
        """Whether a save can begin: where the one before is still being written, all ranks have that from one commit.
        The last save of a run waits for it, another is left out."""
        before = self.saver.in_flight
        if before is None:
            return True
        if last:
            self.settle_now(state)
            return True
        what = (
            f"save of step {state.step} left out: that of step {before} is still being written; is the disk slow? "
            "raise checkpoint.every_ticks"
        )
        self.narrator.fault(state, what, str(self.saver.store.path(state.step)))
        return False

    def settle_now(self, state: RunState) -> None:
        """Waits until nothing is being written or committed, on all ranks together."""
        self.narrator.tell_all(self.saver.drain(axes_of(state), self._patience))

    def finish(self, state: RunState) -> None:
        """Settles the last save, synchronously."""
        self.heartbeat.mark("save-commit")
        self.sink.flush()
        self.narrator.tell_all(self.saver.finish(axes_of(state), self._patience))

    def flush_before_commit(self) -> None:
        """What was told up to a saved tick is written first: a resume from there trains nothing of it again."""
        if self.saver.word in (SaveWord.WRITTEN, SaveWord.FAILED):
            self.sink.flush()
