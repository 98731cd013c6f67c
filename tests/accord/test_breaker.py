"""The breaker of growth: each transition, laws over any order of events, and what legality makes of each phase."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.accord.breaker import BreakerState, after_birth, after_blame, after_order, after_tick
from esper.accord.governor.config import GovernorConfig
from esper.leyline.breaker import BreakerPhase, BreakerView, why_no_birth
from esper.leyline.legality import why_illegal
from esper.leyline.stages import Op
from tests.support.observations import observe, slot_view

CONFIG = GovernorConfig(cool_ticks=4, trial_ticks=3, max_trips=2)
SLOT = frozenset({"r0c0"})
NONE: frozenset[str] = frozenset()


def go(state: BreakerState, first: int, last: int, *, healthy: bool = True, taken=NONE, blended=NONE) -> BreakerState:  # type: ignore[no-untyped-def]
    for tick in range(first, last + 1):
        state = after_tick(state, tick, CONFIG, healthy=healthy, taken=taken, blended=blended)
    return state


def test_it_cools_then_tries_one_seed_then_allows_again() -> None:
    state = after_blame(BreakerState(), 10, CONFIG, "blamed")
    assert (state.phase, state.view(10).ticks_left, state.trips) == (BreakerPhase.COOLING, 4, 1)
    assert go(state, 11, 13).view(13).ticks_left == 1
    state = go(state, 11, 14)
    assert state.phase is BreakerPhase.TRIAL
    assert why_no_birth(state.view(14)) is None
    state = after_birth(state, "r0c0")
    assert why_no_birth(state.view(15)) == "breaker on trial: the seed in r0c0 must stand first"
    state = go(state, 15, 40, taken=SLOT)
    assert state.phase is BreakerPhase.TRIAL, "a seed that incubates cannot reach the host: its health says nothing"
    state = go(state, 41, 42, taken=SLOT, blended=SLOT)
    assert state.phase is BreakerPhase.TRIAL
    state = go(state, 43, 43, healthy=False, taken=SLOT, blended=SLOT)
    assert state.phase is BreakerPhase.TRIAL
    state = go(state, 44, 44, taken=SLOT, blended=SLOT)
    assert (state.phase, state.trips, state.on_trial) == (BreakerPhase.ALLOWED, 0, None)
    assert state.turns == 3


def test_a_seed_that_goes_by_itself_makes_place_for_another() -> None:
    state = go(
        after_birth(go(after_blame(BreakerState(), 0, CONFIG, ""), 1, 4), "r0c0"), 5, 6, taken=SLOT, blended=SLOT
    )
    assert state.stood == 2
    state = go(state, 7, 7)
    assert (state.phase, state.on_trial, state.stood) == (BreakerPhase.TRIAL, None, 0)
    assert why_no_birth(state.view(7)) is None


def test_each_further_panic_cools_twice_as_long_until_it_stays_open() -> None:
    state, lengths = BreakerState(), []
    for _ in range(CONFIG.max_trips):
        state = after_blame(state, 0, CONFIG, "blamed")
        lengths.append(state.view(0).ticks_left)
        state = go(state, 1, lengths[-1])
        assert state.phase is BreakerPhase.TRIAL
    assert lengths == [4, 8]
    state = after_blame(state, 0, CONFIG, "blamed")
    assert state.phase is BreakerPhase.OPEN
    assert go(state, 1, 1000) == state
    assert after_blame(state, 5, CONFIG, "again") == state


@pytest.mark.parametrize("phase", list(BreakerPhase))
def test_an_order_turns_it_from_anywhere_and_says_that_it_was_one(phase: BreakerPhase) -> None:
    open_ = BreakerState(phase=BreakerPhase.OPEN, trips=3, turns=5)
    state = after_order(open_, phase, 7, CONFIG.cool_ticks, "I know better")
    assert (state.phase, state.manual, state.why, state.turns) == (phase, True, "I know better", 6)
    assert state.trips == (0 if phase is BreakerPhase.ALLOWED else 3)
    assert state.view(7).ticks_left == (4 if phase is BreakerPhase.COOLING else 0)
    assert not after_blame(after_order(state, BreakerPhase.ALLOWED, 8, CONFIG.cool_ticks, ""), 9, CONFIG, "").manual


@given(st.lists(st.sampled_from(["panic", "sick", "well", "birth", "gone", "blends"]), max_size=80))
def test_laws_over_any_life(events: list[str]) -> None:
    """Only a seed that stood brings it back to ALLOWED, OPEN is for good, and every turn is counted."""
    state, taken, blended, stood = BreakerState(), NONE, NONE, 0
    for tick, event in enumerate(events):
        before = state
        if event == "panic":
            state, taken, blended = after_blame(state, tick, CONFIG, ""), NONE, NONE
        elif event == "birth" and why_no_birth(state.view(tick)) is None and not taken:
            state, taken = after_birth(state, "r0c0"), SLOT
        elif event == "gone":
            taken = blended = NONE
        elif event == "blends":
            blended = taken
        else:
            state = after_tick(state, tick, CONFIG, healthy=event == "well", taken=taken, blended=blended)
        stood = stood + 1 if event == "well" and blended and before.phase is BreakerPhase.TRIAL else stood
        stood = 0 if event in ("panic", "gone") else stood
        assert (state.turns - before.turns) == (
            state.phase is not before.phase or (event == "panic" and state != before)
        )
        if before.phase is not BreakerPhase.ALLOWED and state.phase is BreakerPhase.ALLOWED:
            assert stood >= CONFIG.trial_ticks
        if before.phase is BreakerPhase.OPEN:
            assert state == before
        assert state.trips <= CONFIG.max_trips + 1
        assert state.view(tick).ticks_left <= CONFIG.cool_ticks * 2 ** (CONFIG.max_trips - 1)


@pytest.mark.parametrize(
    ("view", "reason"),
    [
        (BreakerView(), None),
        (BreakerView(phase=BreakerPhase.COOLING, ticks_left=7), "breaker cooling, 7 ticks left"),
        (BreakerView(phase=BreakerPhase.TRIAL), None),
        (BreakerView(phase=BreakerPhase.TRIAL, on_trial="r1c0"), "breaker on trial: the seed in r1c0 must stand first"),
        (BreakerView(phase=BreakerPhase.OPEN), "breaker open"),
    ],
)
def test_legality_asks_the_breaker(view: BreakerView, reason: str | None) -> None:
    slot = slot_view()
    found = why_illegal(observe(slot, breaker=view), slot, Op.GERMINATE)
    assert found == reason if found is None or reason is None else found.startswith(reason)


def test_legality_knows_a_barred_slot() -> None:
    slot = dataclasses.replace(slot_view(), embargo_left=3)
    assert why_illegal(observe(slot), slot, Op.GERMINATE) == "barred after a rollback, 3 ticks left"
