"""The event of a tick: its agreed numbers, and the slots that have changed since the last one.

A run with 48 slots of which a few live would write 50 kB a tick, mostly of what did not change.
"""

from esper.accord.state import RunState
from esper.leyline.events import SlotLine, TickDone
from esper.leyline.evidence import ABSENT
from esper.tolaria.lockstep.lines import line_of

WHOLE_EVERY = 100  # ticks between two that tell of every slot


class TickTeller:
    """Makes the event of each tick; remembers what it has told of each slot."""

    def __init__(self) -> None:
        self._told: dict[str, SlotLine] = {}

    def forget(self) -> None:
        """Has the next tick tell of every slot, since earlier ones count no more."""
        self._told.clear()

    def event_of(
        self,
        before: RunState,
        state: RunState,
        *,
        parameters: int,
        lr: float,
        steps_ms: float,
        data_ms: float,
        own_ms: float,
        tick_ms: float,
        digest_ms: float,
    ) -> TickDone:
        """Returns the agreed numbers of the tick, and of the slots those that have changed."""
        if state.tick % WHOLE_EVERY == 0:
            self._told.clear()
        every = [line_of(state, entry) for entry in state.slots]
        lines = tuple([line for line in every if self._told.get(line.slot) != line])
        self._told |= {line.slot: line for line in lines}
        known = state.flops is not None and before.flops is not None
        return TickDone(
            step=state.step,
            tick=state.tick,
            epoch=state.epoch,
            train_loss=state.train_loss,
            train_accuracy=state.train_accuracy,
            validation_loss=state.validation_loss,
            validation_accuracy=state.validation_accuracy,
            metrics={entry.name: entry.reading for entry in state.metrics},
            lr=lr,
            host_gradient_norm=state.host_norm,
            host_health=state.host_health,
            slots=lines,
            parameters=parameters,
            live_seeds=sum([entry.stage.is_live for entry in state.slots]),
            flops=state.flops,
            interval_flops=(state.flops or 0) - (before.flops or 0) if known else None,
            samples=state.samples - before.samples,
            data_ms=data_ms,
            own_ms=own_ms,
            steps_ms=steps_ms,
            tick_ms=tick_ms,
            digest_ms=digest_ms,
            together=state.together if state.together.tick == state.tick else ABSENT,
        )
