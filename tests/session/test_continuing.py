"""A session continues its network in copies on its newest batches; the session itself does not notice."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import esper
from esper.accord.state import Continuing
from esper.leyline.events import SeedContinued
from tests.support.sessions import EVERY, GATES, LIFE, A, make, of, replica, train

HOLDING_STEPS = 8 * EVERY
FEW = {"continue_steps": 6, "continue_piece": 24, "baseline": "continued"}


def in_holding(actions: Iterable[dict[str, Any]] = LIFE, **gates: Any) -> esper.Session:
    """A session whose first seed is in HOLDING at full alpha, about to begin a new tick."""
    session = make(gates={**GATES, **FEW, **gates}, actions=actions)
    train(session, range(HOLDING_STEPS))
    assert session.state.slot(A).stage.name == "HOLDING"
    return session


def ask(session: esper.Session) -> None:
    wanted = Continuing(slot=A, generation=1, tick=session.state.tick)
    session._loop.state = replace(session.state, continuing=wanted)


def test_the_copies_are_judged_at_the_next_tick_and_leave_no_trace() -> None:
    session, twin = in_holding(), in_holding()
    ask(session)
    train(session, range(HOLDING_STEPS, HOLDING_STEPS + EVERY))
    entry = session.state.slot(A)
    assert entry.continued == 1
    assert entry.lasting is not None
    assert entry.lasting.clusters == 8
    assert session.state.continuing is None
    train(twin, range(HOLDING_STEPS, HOLDING_STEPS + EVERY))
    assert {**replica(session), "state": None} == {**replica(twin), "state": None}
    session.close()
    twin.close()


STAYING = [action for action in LIFE if action["op"] != "FOSSILIZE"]


def test_batches_are_kept_while_a_seed_holds_and_a_save_begins_anew() -> None:
    session = in_holding(STAYING, continue_piece=5)
    evaluator = session._loop.parts.evaluator
    train(session, range(HOLDING_STEPS, HOLDING_STEPS + 1))
    assert len(evaluator.recent) == 1
    session.state_dict()
    assert len(evaluator.recent) == 0
    ask(session)
    train(session, range(HOLDING_STEPS + 1, HOLDING_STEPS + 2))
    assert len(evaluator.recent) == 0, "the copies have them"
    assert session.state.continuing is not None
    assert (session.state.continuing.done, session.state.continuing.step) == (5, session.steps)
    assert evaluator.copies.saved()
    session.state_dict()
    assert (session.state.continuing.done, session.state.continuing.restarts) == (0, 1)
    assert not evaluator.copies.saved()
    session.close()


def test_a_session_that_saves_and_one_that_is_restored_judge_alike() -> None:
    session = in_holding(STAYING, continue_piece=5)
    train(session, range(HOLDING_STEPS, HOLDING_STEPS + 1))
    ask(session)
    train(session, range(HOLDING_STEPS + 1, HOLDING_STEPS + 4))
    state = session.state_dict()
    further = range(HOLDING_STEPS + 4, HOLDING_STEPS + 10)
    train(session, further)
    assert session.state.slot(A).continued == 1, "in pieces of ten"
    other = make(gates={**GATES, **FEW, "continue_piece": 5}, actions=STAYING)
    other.load_state_dict(state)
    train(other, further)
    assert replica(other) == replica(session)
    assert other.state.slot(A).lasting == session.state.slot(A).lasting
    for one in (session, other):
        one.close()


def test_saves_without_end_do_not_keep_it_from_ending() -> None:
    session = in_holding(STAYING, continue_piece=2)
    ask(session)
    for step in range(HOLDING_STEPS, HOLDING_STEPS + 5 * EVERY):
        train(session, [step])
        session.state_dict()
    assert session.state.slot(A).continued == 1
    session.close()


def test_the_event_says_what_was_found() -> None:
    session = make(gates={**GATES, **FEW})
    train(session, range(HOLDING_STEPS))
    ask(session)
    train(session, range(HOLDING_STEPS, HOLDING_STEPS + EVERY))
    (event,) = of(session, SeedContinued)
    lasting = session.state.slot(A).lasting
    assert lasting is not None
    assert (event.slot, event.number, event.last, event.lower) == (A, 1, lasting.last, lasting.lower)
    session.close()
