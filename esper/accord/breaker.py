"""How the circuit breaker of growth moves (its phases: `esper.leyline.breaker`): pure functions of agreed data.

Time is in ticks. A panic that growth is blamed for cools it for ``cool_ticks``, the next without a success between them
for twice as long, and so on; one more than ``max_trips`` opens it for good. A success is a seed that was born on trial
and has stood *blended* for ``trial_ticks`` healthy ticks: before that it cannot reach the host, so its health says
nothing. A seed on trial that goes by itself makes place for another.
"""

from dataclasses import dataclass, replace

from esper.accord.config import GovernorConfig
from esper.leyline.breaker import BreakerPhase, BreakerView


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerOrder:
    """Somebody's order to turn the breaker, for a run that is resumed.

    Fields:
        id: its own; a state that holds it has obeyed. phase: to turn the breaker to. why: for the record.
    """

    id: str
    phase: BreakerPhase
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerState:
    """The agreed record of the breaker.

    Fields:
        phase: see `BreakerPhase`. until_tick: end of COOLING. trips: panics blamed on growth since a success.
        on_trial: slot of the seed on trial. stood: healthy ticks that it has been blended.
        why: of the latest transition. manual: somebody made it. turns: transitions so far.
        obeyed: id of the latest order that was obeyed, "" without one.
    """

    phase: BreakerPhase = BreakerPhase.ALLOWED
    until_tick: int = 0
    trips: int = 0
    on_trial: str | None = None
    stood: int = 0
    why: str = ""
    manual: bool = False
    turns: int = 0
    obeyed: str = ""

    def view(self, tick: int) -> BreakerView:
        """What a controller sees at a tick."""
        left = max(0, self.until_tick - tick) if self.phase is BreakerPhase.COOLING else 0
        return BreakerView(phase=self.phase, ticks_left=left, on_trial=self.on_trial)


def _turned(state: BreakerState, phase: BreakerPhase, why: str, *, manual: bool = False) -> BreakerState:
    cleared = replace(state, phase=phase, on_trial=None, stood=0, why=why, manual=manual, turns=state.turns + 1)
    return replace(cleared, until_tick=0)


def after_birth(state: BreakerState, slot: str) -> BreakerState:
    """A germination was committed in ``slot``; on trial it is the one that is watched."""
    return replace(state, on_trial=slot, stood=0) if state.phase is BreakerPhase.TRIAL else state


def after_tick(
    state: BreakerState,
    tick: int,
    config: GovernorConfig,
    *,
    healthy: bool,
    taken: frozenset[str],
    blended: frozenset[str],
) -> BreakerState:
    """A tick has gone by.

    Args:
        tick, healthy: it, and its verdict. taken: slots with a seed, or one staged. blended: those that reach the host.
    """
    if state.phase is BreakerPhase.COOLING and tick >= state.until_tick:
        return _turned(state, BreakerPhase.TRIAL, "the time is over; one seed at a time")
    if state.phase is not BreakerPhase.TRIAL or state.on_trial is None:
        return state
    if state.on_trial not in taken:
        return replace(state, on_trial=None, stood=0)
    if not healthy or state.on_trial not in blended:
        return state
    stood = state.stood + 1
    if stood < config.trial_ticks:
        return replace(state, stood=stood)
    why = f"the seed in {state.on_trial} stood blended for {stood} healthy ticks"
    return replace(_turned(state, BreakerPhase.ALLOWED, why), trips=0)


def after_blame(state: BreakerState, tick: int, config: GovernorConfig, why: str) -> BreakerState:
    """Growth is blamed for a panic; ``tick`` is the one that the run goes on from."""
    if state.phase is BreakerPhase.OPEN:
        return state
    trips = state.trips + 1
    if trips > config.max_trips:
        return replace(_turned(state, BreakerPhase.OPEN, f"{why}; {trips} panics without a success"), trips=trips)
    until = tick + config.cool_ticks * 2 ** (trips - 1)
    return replace(_turned(state, BreakerPhase.COOLING, why), trips=trips, until_tick=until)


def after_order(state: BreakerState, phase: BreakerPhase, tick: int, config: GovernorConfig, why: str) -> BreakerState:
    """Somebody's order, committed at ``tick``; ALLOWED forgets the trips."""
    after = _turned(state, phase, why, manual=True)
    if phase is BreakerPhase.ALLOWED:
        return replace(after, trips=0)
    return replace(after, until_tick=tick + config.cool_ticks) if phase is BreakerPhase.COOLING else after
