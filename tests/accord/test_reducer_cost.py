"""What a tick costs the reducer when every slot is commanded at once: linear in the slots, counted in calls."""

from collections import Counter

import pytest

from esper.accord import reducer
from esper.accord.lifecycle import SlotState
from esper.accord.state import Spent, Terms
from esper.leyline.events.growth import CommandJudged
from tests.support.agreed_states import germinate, run_of


def calls_of_a_tick(slots: int, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Calls in a tick in which every slot is asked to germinate, under budgets that are kept count of."""
    run = run_of(slots, max_live=slots, max_parameters=10**9, max_flops=10**12)
    calls: Counter[str] = Counter()
    conditions_of, spent_by = reducer.conditions_of, Terms.spent_by

    def counted_conditions(*args: object) -> object:
        calls["conditions_of"] += 1
        return conditions_of(*args)  # type: ignore[arg-type]

    def counted_spent(self: Terms, entry: SlotState) -> Spent:
        calls["spent_by"] += 1
        return spent_by(self, entry)

    with monkeypatch.context() as patched:
        patched.setattr(reducer, "conditions_of", counted_conditions)
        patched.setattr(Terms, "spent_by", counted_spent)
        run.tick(*(germinate(entry.slot) for entry in run.state.slots))
    assert len(run.events(CommandJudged)) == slots
    assert all(entry.staged is not None for entry in run.state.slots)
    return calls


def test_commands_for_all_slots_cost_calls_linear_in_the_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (calls_of_a_tick(slots, monkeypatch) for slots in (12, 48))
    assert few["conditions_of"] == 12
    assert many["conditions_of"] == 48, "once for each commanded slot"
    assert few["spent_by"] >= 12
    assert many["spent_by"] == pytest.approx(4 * few["spent_by"], rel=0.1)
