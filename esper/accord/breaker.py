"""The moves of the circuit breaker of growth (its phases: `esper.leyline.breaker`): pure functions of agreed data.

Time is in ticks. A panic that is blamed on growth starts a cool-down of ``cool_ticks``; the next one without a success
in between starts one twice as long, and so on. One panic more than ``max_trips`` opens the breaker for good. A success
is a seed that was born on trial and has stood *blended* for ``trial_ticks`` healthy ticks. Before it is blended a seed
cannot reach the host, so a healthy host says nothing about it. If the seed on trial is pruned, another may be born.
"""

from dataclasses import dataclass, replace

from esper.accord.governor.config import GovernorConfig
from esper.leyline.breaker import BreakerPhase, BreakerView


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerOrder:
    """A person's order to turn the breaker, given to a run that is resumed.

    Fields:
        id: unique id of the order; a state that holds it has obeyed the order.
        phase: phase to turn the breaker to.
        why: reason, for the record.
    """

    id: str
    phase: BreakerPhase
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerState:
    """The agreed record of the breaker.

    Fields:
        phase: see `BreakerPhase`.
        until_tick: tick at which COOLING ends.
        trips: panics blamed on growth since the last success.
        on_trial: slot of the seed on trial, or None.
        stood: healthy ticks for which the seed on trial has been blended.
        why: reason of the latest transition.
        manual: whether a person ordered the latest transition.
        turns: transitions so far.
        obeyed: id of the latest order that was obeyed; "" if there was none.
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
        """Returns what a controller sees at a tick."""
        left = max(0, self.until_tick - tick) if self.phase is BreakerPhase.COOLING else 0
        return BreakerView(phase=self.phase, ticks_left=left, on_trial=self.on_trial)


def _turn(state: BreakerState, phase: BreakerPhase, why: str, *, manual: bool = False) -> BreakerState:
    turns = state.turns + 1
    return replace(state, phase=phase, until_tick=0, on_trial=None, stood=0, why=why, manual=manual, turns=turns)


def after_birth(state: BreakerState, slot: str) -> BreakerState:
    """Returns the record after a germination was committed in ``slot``; in TRIAL that seed is the one on trial."""
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
    """Returns the record after a tick.

    Args:
        state: the record before the tick.
        tick: number of the tick.
        config: settings of the governor.
        healthy: whether the tick was healthy.
        taken: slots with a seed, or with one staged.
        blended: slots whose seed reaches the host.
    """
    if state.phase is BreakerPhase.COOLING and tick >= state.until_tick:
        return _turn(state, BreakerPhase.TRIAL, "the time is over; one seed at a time")
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
    return replace(_turn(state, BreakerPhase.ALLOWED, why), trips=0)


def after_blame(state: BreakerState, tick: int, config: GovernorConfig, why: str) -> BreakerState:
    """Returns the record after growth was blamed for a panic; ``tick`` is the tick from which the run goes on."""
    if state.phase is BreakerPhase.OPEN:
        return state
    trips = state.trips + 1
    if trips > config.max_trips:
        return replace(_turn(state, BreakerPhase.OPEN, f"{why}; {trips} panics without a success"), trips=trips)
    until = tick + config.cool_ticks * 2 ** (trips - 1)
    return replace(_turn(state, BreakerPhase.COOLING, why), trips=trips, until_tick=until)


def after_order(state: BreakerState, phase: BreakerPhase, tick: int, cool_ticks: int, why: str) -> BreakerState:
    """Returns the record after a person's order, committed at ``tick``; ALLOWED also resets the trips."""
    after = _turn(state, phase, why, manual=True)
    if phase is BreakerPhase.ALLOWED:
        return replace(after, trips=0)
    return replace(after, until_tick=tick + cool_ticks) if phase is BreakerPhase.COOLING else after
