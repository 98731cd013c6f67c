"""A session continues its network in copies on the batches since the last tick; the session itself does not notice."""

from dataclasses import replace

import esper
from esper.leyline.events import SeedContinued
from tests.support.sessions import EVERY, GATES, A, make, of, replica, train

HOLDING_STEPS = 8 * EVERY
FEW = {"continue_steps": 6}


def in_holding() -> esper.Session:
    """A session whose first seed is in HOLDING at full alpha, about to begin a new tick."""
    session = make(gates={**GATES, **FEW})
    train(session, range(HOLDING_STEPS))
    assert session.state.slot(A).stage.name == "HOLDING"
    return session


def ask(session: esper.Session) -> None:
    session._loop.state = replace(session.state, continuing=A)


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


def test_batches_are_kept_only_while_a_seed_waits_and_a_save_lets_go_of_them() -> None:
    session = in_holding()
    recent = session._loop.parts.evaluator.recent
    train(session, range(HOLDING_STEPS, HOLDING_STEPS + 1))
    assert len(recent) == 0
    ask(session)
    session.state_dict()
    train(session, range(HOLDING_STEPS + 1, HOLDING_STEPS + 2))
    assert len(recent) == 0, "they have been used"
    assert session.state.slot(A).continued == 1
    ask(session)
    train(session, range(HOLDING_STEPS + 2, HOLDING_STEPS + 3))
    assert len(recent) == 1
    session.state_dict()
    assert len(recent) == 0
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
