"""A tick costs what is live, not what could be: guarded by counts of function calls, which no load moves."""

from dataclasses import replace

import pytest

from esper.accord.observation import observe_empty, observe_slot
from esper.tolaria.ranks.config import ControlConfig
from tests.support.many_slots import Cost, Crowded, measure

TENSORS = 120


def costs(slots: int, live: int, tensors: int = TENSORS) -> tuple[Cost, Cost]:
    crowded = Crowded(slots, live, tensors)
    found = crowded.costs(rounds=1)
    crowded.session.close()
    return found


def test_a_tick_costs_what_is_live() -> None:
    """As calls: many empty slots at most twice; each further seed at most 1.2 of what one of few costs."""
    (_, few), (step, many), (_, full) = costs(4, 4), costs(48, 4), costs(16, 16)
    assert many.calls <= 1.2 * few.calls
    assert full.calls / 16 <= 1.2 * few.calls / 4
    (wider, tick) = costs(48, 4, 3 * TENSORS)
    assert wider.calls - step.calls <= 2 * TENSORS * 9  # torch's optimizer has some 8 calls for each tensor
    assert tick.calls - many.calls <= 2 * TENSORS * 2


def test_ticks_are_at_most_a_fiftieth_of_a_run_s_calls() -> None:
    """With the default of 50 steps between ticks, and nothing but calls of ours and torch's to look at."""
    crowded = Crowded(4, 4, 1154)
    crowded.step()
    whole = measure(crowded.step, count=True)
    crowded.step()
    _, tick = crowded.costs(rounds=1)
    crowded.session.close()
    assert tick.calls / (ControlConfig().every * whole + tick.calls) <= 0.02, (whole, tick)


def test_a_bare_slot_is_observed_as_any_other() -> None:
    crowded = Crowded(3, 1, 10)
    state, terms = crowded.session.state, crowded.session._loop.terms
    barred = replace(state, governor=replace(state.governor, barred={"r1c0": state.tick + 5}))
    for at in (state, barred):
        for slot in at.slots[1:]:
            assert observe_empty(at, slot, terms) == observe_slot(at, slot, terms)
    crowded.session.close()


@pytest.mark.slow
def test_seconds_of_a_tick() -> None:
    """Prints the table of BENCHMARKS.md: pytest -s."""
    for slots, live in ((4, 4), (48, 4), (48, 48), (256, 4)):
        step, tick = costs(slots, live, 1154)
        print(f"\n{slots} slots, {live} live: step {step}, tick {tick}", end="")
