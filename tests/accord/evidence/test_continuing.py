"""The course of a continuation over ticks: pieces, verdict, and what ends one without a verdict."""

from dataclasses import replace
from typing import Any

import pytest

from esper.accord.config import GateConfig
from esper.accord.evidence.continuing import begin_anew, steps_due
from esper.accord.evidence.lasting import NAMES
from esper.accord.facts import next_continuation
from esper.accord.governor.config import GovernorConfig
from esper.accord.replay import replay
from esper.accord.state import Continuing
from tests.support.agreed_states import Run, ask, germinate, make_terms, refusals

HELPS = dict.fromkeys(NAMES, 0.0) | {"clusters": 100, "count": 100, "size_sq": 100, "size1": 5, "size2": 5}
HELPS |= {"sum1": 5, "sum2": 5, "sq1": 0.26, "sq2": 0.26, "cross": 0.25}
LASTS = {f"continued_{name}": value for name, value in HELPS.items()}


def holding(**gates: Any) -> Run:
    """A run whose seed in r0c0 has just come so far that it is to be continued."""
    settings = {"evidence": "enforce", "baseline": "continued", "continue_steps": 10, "continue_piece": 10, **gates}
    run = Run(make_terms(gates=settings, incubation="immediate"))
    run.tick(germinate("r0c0"))
    run.tick()
    run.tick(ask("r0c0", "ADVANCE"))
    while run.slot().stage.name != "HOLDING":
        run.tick(ask("r0c0", "ADVANCE"))
        assert run.state.tick < 30
    while run.state.continuing is None:
        run.tick()
        assert run.state.tick < 30
    return run


def under_way(run: Run) -> Continuing:
    assert run.state.continuing is not None
    return run.state.continuing


@pytest.mark.parametrize(("piece", "ticks"), [(10, 4), (15, 3), (40, 1), (1000, 1)])
def test_it_takes_a_piece_a_tick_and_its_verdict_is_of_the_step_at_which_it_began(piece: int, ticks: int) -> None:
    run = holding(continue_piece=piece)
    asked = under_way(run)
    assert (asked.slot, asked.generation, asked.done, asked.step) == ("r0c0", 1, 0, None)
    for tick in range(1, ticks):
        run.tick(ask("r0c0", "FOSSILIZE"))
        assert (under_way(run).done, under_way(run).step) == (tick * piece, 10 * (asked.tick + 1))
        (why,) = refusals(run)
        assert f"not yet: continuation 1 of 3 is under way, {tick * piece} of 40 steps of its copies done" in why
        assert run.slot().stage.name == "HOLDING"
    run.tick(ask("r0c0", "FOSSILIZE"), **LASTS)
    assert run.slot().stage.name == "FOSSILIZED", run.out.events
    assert run.state.continuing is None
    lasting = run.slot().lasting
    assert lasting is not None
    assert run.slot().continued == 1
    assert (lasting.last, lasting.tick) == (pytest.approx(0.05), run.state.tick)
    assert lasting.ahead == 10 + 8 * 7, "counted from the step at which the network was put aside"
    assert lasting.retry_step == 10 * (asked.tick + 1) + 10


def test_an_error_of_the_copies_on_some_rank_ends_it_at_once_and_counts() -> None:
    run = holding()
    run.tick()
    run.tick(continued_nonfinite=1)
    assert (run.slot().continued, run.slot().lasting) == (1, None)
    while run.state.continuing is None:
        run.tick()
    assert run.state.tick % run.terms.gates.relook_every == 0, "not at once"


@pytest.mark.parametrize(
    ("op", "fields"), [("PRUNE", {"ticks": 0}), ("PRUNE", {"ticks": 5}), ("SET_ALPHA_TARGET", {"target": 0.5})]
)
def test_a_seed_that_leaves_holding_ends_it_without_a_verdict(op: str, fields: dict[str, Any]) -> None:
    run = holding()
    run.tick()
    assert under_way(run).done == 10
    run.tick(ask("r0c0", op, **fields))
    assert run.slot().stage.name != "HOLDING"
    assert run.state.continuing is None, run.out.events
    run.tick(**LASTS)
    assert run.slot().lasting is None
    assert run.slot().continued == 0


def test_a_birth_beside_it_is_none_of_its_business() -> None:
    run = holding()
    run.tick(germinate("r0c1"))
    run.tick()
    assert run.slot("r0c1").stage.name == "GERMINATED"
    assert under_way(run).done == 20
    run.tick(ask("r0c1", "ADVANCE"))
    run.tick(**LASTS)
    assert run.slot().continued == 1


def test_one_seed_at_a_time() -> None:
    run = holding()
    run.state = run.state.with_slots({"r0c1": replace(run.slot(), slot="r0c1")})
    for _ in range(3):
        run.tick()
        assert under_way(run).slot == "r0c0"
    run.tick(**LASTS)
    assert under_way(run).slot == "r0c1"


@pytest.mark.parametrize("short", [0, 1])
def test_none_begins_that_cannot_end_before_the_run(short: int) -> None:
    run = holding()
    total = run.state.step + 4 * 10 - short
    found = next_continuation(replace(run.state, continuing=None), replace(run.terms, total_steps=total))
    assert (found is None) == bool(short)


def test_a_rollback_ends_it_without_a_verdict() -> None:
    run = holding()
    target = run.state
    run.tick()
    run.tick()
    found = replay(run.state, target, run.terms, GovernorConfig()).outcome.state
    assert target.continuing is not None
    assert found.continuing is None
    assert found.slot("r0c0").continued == 0


def test_begun_anew_its_pieces_are_twice_as_large_so_that_it_ends() -> None:
    run, gates = holding(), GateConfig(continue_steps=10, continue_piece=10)
    assert begin_anew(run.state) is run.state, "nothing is done yet"
    due = []
    for _ in range(2):
        run.tick()
        due.append(steps_due(under_way(run), gates))
        run.state = begin_anew(run.state)
        assert (under_way(run).done, under_way(run).step) == (0, None)
    assert due == [20, 40]
    run.tick(**LASTS)
    assert run.slot().continued == 1
