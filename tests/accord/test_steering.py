"""Orders to the whole run: what each does to the agreed record, what a pause keeps, and what a rollback bars."""

from dataclasses import replace

import pytest

from esper.accord.absorb import absorb
from esper.accord.governor.config import GovernorConfig
from esper.accord.orders.steering import BREAKER, Steering, after_order, after_rollback
from esper.accord.reducer import reduce_tick
from esper.accord.replay import replay
from esper.leyline.breaker import BreakerPhase
from esper.leyline.commands import Command, wait
from esper.leyline.events import BreakerChanged, CommandJudged, CommandRefused
from esper.leyline.orders.verbs import LEVELS, PHASES, RunOrder, RunVerb
from esper.leyline.plain import digest62, from_plain, to_plain
from esper.leyline.stages import Stage
from tests.support.agreed_states import Run, ask, at, germinate, run_of

PAUSE, RESUME = RunOrder(verb=RunVerb.PAUSE), RunOrder(verb=RunVerb.RESUME)


def order_tick(run: Run, order: RunOrder, *commands: Command) -> None:
    """A tick that commits an order."""
    step = run.state.step + run.terms.tick_steps
    run.absorbed = absorb(run.state, run.sums({}), run.terms, step=step, epoch=1)
    asked = {entry.slot: wait(entry.slot) for entry in run.state.slots} | {c.slot: c for c in commands}
    run.out = reduce_tick(run.absorbed, asked, {}, run.terms, stage_ticks=run.stage_ticks, order=order)
    run.state = run.out.state


@pytest.mark.parametrize("stage", [Stage.GERMINATED, Stage.TRAINING, Stage.BLENDING, Stage.HOLDING])
def test_a_pause_lets_nothing_grow_and_lets_seeds_be_pruned(stage: Stage) -> None:
    run = at(stage)
    order_tick(run, PAUSE, germinate("r0c1"))
    refused = [event for event in run.out.events if isinstance(event, CommandRefused)]
    assert [event.reason for event in refused] == ["growth is paused by an order"]
    onward = ask("r0c0", "FOSSILIZE" if stage is Stage.HOLDING else "ADVANCE")
    for command in (onward, ask("r0c0", "SET_ALPHA_TARGET", target=0.5, ticks=2)):
        run.tick(command)
        assert run.slot().stage is stage
        assert run.events(CommandRefused)[-1].reason == "growth is paused by an order"
    assert run.slot().request is None, "no look is drawn"
    drawn = run.slot().drawn
    run.tick()
    assert run.slot().drawn == drawn
    run.tick(ask("r0c0", "PRUNE"))
    assert run.slot().stage is Stage.PRUNED


def test_after_a_pause_growth_goes_on_where_it_was() -> None:
    run = at(Stage.TRAINING)
    order_tick(run, PAUSE)
    run.tick()
    order_tick(run, RESUME, ask("r0c0", "ADVANCE"))
    assert run.slot().stage is Stage.BLENDING


def test_what_was_begun_ends_by_itself_in_a_pause() -> None:
    run = run_of()
    run.tick(germinate("r0c0"))
    order_tick(run, PAUSE)
    assert run.slot().stage is Stage.GERMINATED, "it was staged before"
    run = at(Stage.BLENDING)
    run.tick(ask("r0c0", "PRUNE", ticks=2))
    order_tick(run, PAUSE)
    run.tick()
    assert run.slot().stage is Stage.PRUNED
    for _ in range(6):
        run.tick()
    assert run.slot().stage is Stage.EMPTY


def test_nothing_advances_by_itself_in_a_pause() -> None:
    run = run_of(gates={"auto_advance": ["G1"]})
    run.tick(germinate("r0c0"))
    order_tick(run, PAUSE)
    for _ in range(3):
        run.tick()
    assert run.slot().stage is Stage.GERMINATED
    order_tick(run, RESUME)
    assert run.slot().stage is Stage.TRAINING


@pytest.mark.parametrize("phase", PHASES)
def test_an_order_turns_the_breaker_and_says_so(phase: BreakerPhase) -> None:
    run = run_of()
    order_tick(run, RunOrder(verb=RunVerb.BREAKER, value=PHASES.index(phase), span=5, number=3), germinate("r0c0"))
    breaker = run.state.governor.breaker
    assert (breaker.phase, breaker.manual, breaker.why) == (phase, True, "order 3")
    assert breaker.view(run.state.tick).ticks_left == (5 if phase is BreakerPhase.COOLING else 0)
    changed = run.events(BreakerChanged)
    assert [(event.target, event.manual) for event in changed] == [(phase, True)]
    born = run.events(CommandJudged)
    assert bool(born) == (phase in (BreakerPhase.ALLOWED, BreakerPhase.TRIAL)), "it binds the commands of its own tick"


def test_saves_and_stops_come_after_the_next_tick_or_later() -> None:
    steering = after_order(Steering(), RunOrder(verb=RunVerb.CHECKPOINT), 4)
    assert steering.save_tick == 5
    assert after_order(steering, RunOrder(verb=RunVerb.STOP), 4).stop_tick == 5
    assert after_order(steering, RunOrder(verb=RunVerb.STOP, value=9), 4).stop_tick == 9
    assert after_order(steering, RunOrder(verb=RunVerb.STOP, value=2), 4).stop_tick == 5
    assert after_order(steering, RunOrder(verb=RunVerb.LEVEL, value=1), 4).level == LEVELS[1]


def test_the_record_is_in_the_digest_and_in_a_checkpoint() -> None:
    run = run_of()
    before = digest62(run.state)
    paused = replace(run.state, steering=after_rollback(Steering(), Steering(paused=True), ("r0c0",), 3, 7))
    assert digest62(paused) != before
    assert from_plain(type(run.state), to_plain(paused), "state") == paused


def test_a_rollback_bars_orders_to_what_it_blames_and_to_the_breaker() -> None:
    run = at(Stage.BLENDING)
    target = run.state
    order_tick(run, PAUSE)
    for _ in range(2):
        run.tick()
    sick = replace(run.state, governor=replace(run.state.governor, healthy_tick=target.tick))
    sick = sick.with_slots({"r0c0": replace(sick.slot("r0c0"), changed_tick=sick.tick)})
    after = replay(sick, target, run.terms, GovernorConfig()).outcome.state.steering
    assert not after.paused, "it is taken again at its own tick"
    assert after.rollbacks == 1
    first, last = target.tick + 1, sick.tick
    for what in ("r0c0", BREAKER):
        assert after.bars(what, first, 0)
        assert after.bars(what, last, 0)
        assert not after.bars(what, first - 1, 0)
        assert not after.bars(what, last + 1, 0)
        assert not after.bars(what, first, 1), "an order that was given after the rollback counts"
    assert not after.bars("r0c1", first, 0)
    again = after_rollback(after, Steering(), (), 2, 9)
    assert again.rollbacks == 2
    assert again.bars("r0c0", first, 0), "what was barred stays so"
    assert again.bars(BREAKER, 9, 1)
