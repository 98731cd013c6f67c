"""The governor's judgement and replay as functions: symptoms in agreed sums, who is blamed, what a replay changes."""

from dataclasses import replace
from typing import Any

import pytest

from esper.accord.absorb import absorb
from esper.accord.effects import Discard, Uproot
from esper.accord.governor.config import GovernorConfig
from esper.accord.health import RunHealth, Skip, take_up
from esper.accord.judge import judge_tick
from esper.accord.observation import observation_of
from esper.accord.reducer import reduce_tick
from esper.accord.replay import find_suspects, replay
from esper.accord.state import RunState
from esper.accord.verdict import Symptom, Verdict
from esper.leyline.breaker import BreakerPhase
from esper.leyline.commands import Command, wait
from esper.leyline.events import LossShifted, StageChanged
from esper.leyline.plain import digest62, from_plain, to_plain
from esper.leyline.stages import Mechanical, Stage
from esper.tolaria.lockstep.narrate import trouble_events
from tests.support.agreed_states import Run, ask, at, germinate, run_of

CONFIG = GovernorConfig(min_history=4, history=8, cool_ticks=5, embargo_ticks=9, recover_ticks=3)
CHANCE = 2.3


def tick(run: Run, *commands: Command, loss: float = 1.0, validation: float | None = None, **values: float) -> RunState:
    """A tick as an engine has it, with a mean training loss of ``loss``; returns the state after it."""
    sums = {"train_loss": 10 * loss, "train_count": 10.0, "train_samples": 10.0, **values}
    if validation is not None:
        sums |= {"validation_loss": 20 * validation, "validation_loss_sq": 20 * validation**2, "validation_count": 20.0}
    since, every = run.state.step, run.sums({}, **sums)
    absorbed = absorb(run.state, every, run.terms, step=since + run.terms.tick_steps, epoch=1)
    judged = judge_tick(absorbed, every, run.terms, CONFIG, chance=CHANCE, since=since)
    asked = {entry.slot: wait(entry.slot) for entry in judged.slots} | {c.slot: c for c in commands}
    run.out = reduce_tick(judged, asked, {}, run.terms, stage_ticks=run.stage_ticks)
    run.state = run.out.state
    return run.state


def well(run: Run, ticks: int = 6, **values: float) -> Run:
    for _ in range(ticks):
        assert tick(run, **values).governor.verdict is Verdict.HEALTHY
    return run


def test_a_healthy_tick_is_remembered_and_a_sick_one_is_not() -> None:
    run = well(run_of(), validation=1.5)
    healthy = run.state.governor
    assert (healthy.healthy_tick, healthy.healthy_step) == (run.state.tick, run.state.step)
    assert (healthy.train.losses, healthy.validation.losses) == ((1.0,) * 6, (1.5,) * 6)
    sick = tick(run, loss=5.0, validation=1.5).governor
    assert (sick.verdict, sick.symptom, sick.strikes) == (Verdict.SUSPECT, Symptom.DIVERGENCE, 1)
    noted = replace(healthy.train, row=(5.0,), row_errors=(0.0,))
    assert (sick.train, sick.validation, sick.healthy_tick) == (noted, healthy.validation, healthy.healthy_tick)
    assert "training loss 5, at most" in sick.words
    again = tick(run, loss=5.0).governor
    assert (again.verdict, again.strikes) == (Verdict.PANIC, 2)


def test_one_bad_tick_is_forgiven() -> None:
    run = well(run_of())
    assert tick(run, loss=5.0).governor.verdict is Verdict.SUSPECT
    found = tick(run).governor
    assert (found.verdict, found.strikes, found.words) == (Verdict.HEALTHY, 0, "")


def test_validation_counts_where_it_is_fresh() -> None:
    run = well(run_of(), validation=1.0)
    assert tick(run, validation=3.0).governor.symptom is Symptom.DIVERGENCE
    assert tick(run).governor.symptom is Symptom.NONE, "the validation of the tick before is none of this tick's"


def test_a_memoriser_may_do_worse_than_chance_on_what_it_has_not_seen() -> None:
    run = run_of()
    for k in range(60):
        found = tick(run, loss=0.1, validation=0.5 + 0.05 * k)
        assert found.governor.verdict is Verdict.HEALTHY, k


def test_collapse_is_of_the_training_loss() -> None:
    run = run_of()
    for k in range(16):
        tick(run, loss=2.3 - 0.1 * k)
    for k in range(14):
        found = tick(run, loss=0.9 + 0.1 * k)
    assert found.governor.symptom is Symptom.COLLAPSE
    assert "chance is 2.3" in found.governor.words


def spread(loss: float, error: float) -> dict[str, float]:
    """The sum of squares of ten samples of that mean and standard error."""
    return {"train_loss_sq": 10 * loss**2 + 90 * error**2}


def test_what_ten_samples_explain_is_not_out_of_line() -> None:
    """The standard error is measured: the same means, of samples that differ and of samples that do not."""
    for error, wanted in ((0.5, Symptom.NONE), (0.01, Symptom.DIVERGENCE)):
        run = run_of()
        for _ in range(8):
            tick(run, loss=1.0, **spread(1.0, error))
        found = tick(run, loss=2.0, **spread(2.0, error))
        assert found.train_loss.se == pytest.approx(error)
        assert found.governor.train.errors[0] == pytest.approx(error)
        assert found.governor.symptom is wanted


def test_a_loss_that_comes_to_rest_below_chance_is_told_and_not_taken_back() -> None:
    run = well(run_of(), 8, validation=1.0)
    verdicts = [tick(run, loss=1.6, validation=1.6).governor.verdict for _ in range(2)]
    assert verdicts == [Verdict.SUSPECT] * 2
    before = run.state
    found = tick(run, loss=1.6, validation=1.6)
    sick = found.governor
    assert (sick.verdict, sick.symptom, sick.strikes) == (Verdict.HEALTHY, Symptom.SHIFT, 0)
    assert (found.governor.train.losses, found.governor.train.best) == ((1.6,) * 3, 1.0)
    (event,) = trouble_events(before, found)
    assert isinstance(event, LossShifted)
    assert event.words == "training loss 1.6, out of line for 3 ticks and at rest; it had been 1"
    after = tick(run, loss=1.6, validation=1.6)
    assert (after.governor.verdict, after.governor.symptom) == (Verdict.HEALTHY, Symptom.NONE)
    assert trouble_events(found, after) == []
    tick(run, loss=2.29)
    assert tick(run, loss=2.29).governor.verdict is Verdict.PANIC, "a collapse: what it had reached is not forgotten"


def test_a_loss_that_rises_without_a_pause_is_a_panic_before_it_reaches_chance() -> None:
    run = well(run_of(), 8)
    verdicts = [tick(run, loss=loss).governor.verdict for loss in (1.25, 1.5, 1.75, 2.0)]
    assert verdicts == [Verdict.SUSPECT] * 3 + [Verdict.PANIC]


def test_a_spike_that_falls_is_waited_for_and_one_that_stays_is_not() -> None:
    for losses, wanted in (((3.0, 2.6, 2.4, 1.9, 1.4), Verdict.SUSPECT), ((3.0, 2.95), Verdict.PANIC)):
        run = well(run_of(), 8)
        for loss in losses:
            found = tick(run, loss=loss)
        assert found.governor.verdict is wanted
    assert tick(well(run_of(), 8), loss=1.1).governor.verdict is Verdict.HEALTHY


def test_without_a_judge_nothing_bars_and_with_other_limits_replays_are_counted_anew() -> None:
    health = replace(
        RunHealth(),
        replays=3,
        barred={"r0c0": 99},
        skips=(Skip(first_step=3, count=7),),
        breaker=replace(RunHealth().breaker, phase=BreakerPhase.OPEN, obeyed="one"),
    )
    assert take_up(health, {"checkpoint.keep"}, judged=True) == health
    assert take_up(health, {"governor.rise"}, judged=True) == replace(health, replays=0)
    off = take_up(health, {"governor.enabled"}, judged=False)
    assert (off.barred, off.breaker.phase, off.breaker.obeyed) == ({}, BreakerPhase.ALLOWED, "one")
    assert off.cursor(10) == health.cursor(10) == 17


def test_validation_that_is_not_finite_is_a_panic_at_once() -> None:
    run = well(run_of())
    assert tick(run, validation_nonfinite=1.0).governor.verdict is Verdict.PANIC


def test_a_row_of_skipped_steps_is_one_when_it_is_long_and_no_seed_can_be_taken_out() -> None:
    run = well(run_of())
    last = run.state.governor
    for row in (1, 2, run.terms.max_skips - 1):
        found = tick(run, skipped=1.0, skipped_in_row=float(row)).governor
        assert (found.verdict, found.symptom) == (Verdict.SUSPECT, Symptom.NONFINITE)
        assert found.healthy_step == last.healthy_step, "what failed began with the row"
    assert tick(run, skipped=1.0, skipped_in_row=float(run.terms.max_skips)).governor.verdict is Verdict.PANIC
    blending = well(at(Stage.BLENDING))
    found = tick(blending, skipped=1.0, skipped_in_row=float(run.terms.max_skips))
    assert found.governor.verdict is Verdict.SUSPECT, "the reducer takes the newest blending seed out at this tick"
    assert found.slot("r0c0").stage is Stage.PRUNED


def test_a_quarantined_seed_is_not_a_panic() -> None:
    run = well(at(Stage.BLENDING))
    found = tick(run, validation_nonfinite=1.0, r0c0__nonfinite=1.0)
    assert (found.governor.verdict, found.slot("r0c0").stage) == (Verdict.SUSPECT, Stage.PRUNED)


@pytest.mark.parametrize("how", ["now", "by a ramp", "lower"])
def test_a_network_that_is_made_to_do_without_a_seed_is_not_sick(how: str) -> None:
    run = well(at(Stage.HOLDING))
    command = {
        "now": ask("r0c0", "PRUNE"),
        "by a ramp": ask("r0c0", "PRUNE", ticks=3),
        "lower": ask("r0c0", "SET_ALPHA_TARGET", target=0.2, ticks=3),
    }[how]
    assert tick(run, command).governor.verdict is Verdict.HEALTHY
    for _ in range(5):
        assert tick(run, loss=5.0).governor.verdict is Verdict.HEALTHY, "the series began anew"


@pytest.mark.parametrize("ticks", [2, 12])
def test_a_blow_up_while_a_seed_fades_is_a_panic_unless_it_falls(ticks: int) -> None:
    losses = {"stays": (50.0,) * 6, "falls": (50.0, 40.0, 30.0, 25.0, 20.0, 16.0, 10.0)}
    verdicts = {}
    for how, after in losses.items():
        run = well(at(Stage.HOLDING))
        tick(run, ask("r0c0", "PRUNE", ticks=ticks))
        tick(run)
        verdicts[how] = [tick(run, loss=loss).governor.verdict for loss in after]
    assert verdicts["stays"] == [Verdict.SUSPECT] * 5 + [Verdict.PANIC]
    assert verdicts["falls"] == [Verdict.SUSPECT] * 7
    assert "at most 6.9 where a seed has gone; chance is 2.3" in run.state.governor.words
    assert tick(run, loss=5.0).governor.verdict is Verdict.HEALTHY


def test_what_was_out_of_line_before_a_seed_went_is_no_fault_of_its_going() -> None:
    run = well(at(Stage.HOLDING), validation=1.0)
    assert tick(run, ask("r0c0", "PRUNE"), loss=50.0, validation=1.0).governor.verdict is Verdict.SUSPECT
    found = tick(run, loss=50.0, validation=1.4).governor
    assert found.verdict is Verdict.PANIC
    assert found.validation.losses == (), "that one was in line, so it began anew"


def test_replays_are_forgotten_some_healthy_ticks_beyond_the_panic() -> None:
    run = well(run_of())
    trouble = run.state.tick + 2
    run.state = replace(run.state, governor=replace(run.state.governor, replays=2, trouble_tick=trouble))
    counts = [tick(run).governor.replays for _ in range(8)]
    assert counts == [2] * (2 + CONFIG.recover_ticks - 1) + [0] * (8 - 1 - CONFIG.recover_ticks)


# blame --------------------------------------------------------------------------------------------------------------


def two_blended() -> tuple[Run, list[RunState]]:
    """r0c0 blended first, then r1c0, r0c1 incubates; every state on the way."""
    run = well(run_of(3), 4)
    states = [run.state]
    plan = {
        1: germinate("r0c0"),
        3: ask("r0c0", "ADVANCE"),
        4: ask("r0c0", "ADVANCE"),
        2: germinate("r1c0"),
        5: ask("r1c0", "ADVANCE"),
        6: ask("r1c0", "ADVANCE"),
        7: germinate("r0c1"),
        9: ask("r0c1", "ADVANCE"),
    }
    for number in range(1, 10):
        tick(run, *([plan[number]] if number in plan else []))
        states.append(run.state)
    return run, states


def test_the_newest_change_first_and_only_of_seeds_that_reach_the_host() -> None:
    run, states = two_blended()
    assert run.slot("r0c1").stage is Stage.TRAINING
    assert [entry.slot for entry in find_suspects(run.state, states[0], CONFIG)] == ["r1c0", "r0c0"]
    tick(run, ask("r0c0", "SET_ALPHA_TARGET", target=0.5, ticks=2))
    assert [entry.slot for entry in find_suspects(run.state, states[0], CONFIG)] == ["r0c0", "r1c0"], (
        "a ramp is a change"
    )


def test_what_is_long_past_is_not_blamed() -> None:
    run, states = two_blended()
    well(run, CONFIG.blame_ticks)
    assert find_suspects(run.state, states[0], CONFIG) == []


def test_a_seed_that_was_a_fossil_by_then_is_not_blamed_one_that_became_it_since_is() -> None:
    run = well(at(Stage.HOLDING), 2)
    before = run.state
    tick(run, ask("r0c0", "FOSSILIZE"))
    assert run.slot().stage is Stage.FOSSILIZED
    assert [entry.slot for entry in find_suspects(run.state, before, CONFIG)] == ["r0c0"]
    assert find_suspects(run.state, run.state, CONFIG) == []


@pytest.mark.parametrize(
    ("stage", "effect"), [(0, None), (1, Discard), (2, Uproot), (3, Uproot), (4, Uproot), (5, Uproot)]
)
def test_the_blamed_seed_is_undone_wherever_the_generation_has_it(stage: int, effect: type | None) -> None:
    """Not there yet, staged, GERMINATED, TRAINING, BLENDING."""
    run, states = two_blended()
    target = states[stage]
    present = replace(run.state, slots=tuple(e if e.slot == "r0c0" else target.slot(e.slot) for e in run.state.slots))
    found = replay(present, target, run.terms, CONFIG)
    assert [entry.slot for entry in found.blamed] == ["r0c0"]
    assert found.skip is None
    assert [type(e) for e in found.outcome.effects] == ([] if effect is None else [effect])
    after = found.outcome.state
    assert (after.tick, after.step) == (target.tick, target.step)
    slot = after.slot("r0c0")
    assert slot.staged is None
    assert slot.stage is (Stage.PRUNED if effect is Uproot else Stage.EMPTY)
    moved = [e for e in found.outcome.events if isinstance(e, StageChanged)]
    assert [e.cause for e in moved] == ([Mechanical.ROLLBACK.name] if effect is Uproot else [])
    assert after.governor.barred == {"r0c0": target.tick + CONFIG.embargo_ticks}
    view = observation_of(after, run.terms).slot("r0c0")
    assert view.embargo_left == CONFIG.embargo_ticks
    assert after.governor.breaker.phase is BreakerPhase.COOLING
    if effect is Discard:
        assert after.germinations == target.germinations - 1


def test_with_nobody_to_blame_the_samples_since_the_last_healthy_tick_are_left_out() -> None:
    run = well(run_of(), 4)
    target = run.state
    well(run, 2)
    healthy = run.state.step
    tick(run, loss=9.0)
    present = tick(run, loss=9.0)
    assert present.governor.verdict is Verdict.PANIC
    found = replay(present, target, run.terms, CONFIG)
    window = present.step - healthy
    assert found.skip == Skip(first_step=healthy, count=window)
    assert found.outcome.state.governor.breaker.phase is BreakerPhase.ALLOWED
    after = found.outcome.state.governor
    assert [after.cursor(step) - step for step in (target.step, healthy - 1, healthy, present.step)] == [
        0,
        0,
        window,
        window,
    ]
    assert (after.replays, after.trouble_tick, after.verdict, after.strikes) == (1, present.tick, Verdict.HEALTHY, 0)


def test_each_replay_goes_wider() -> None:
    run, states = two_blended()
    present = replace(run.state, governor=replace(run.state.governor, replays=1, skips=(Skip(first_step=3, count=7),)))
    present = replace(present, step=present.step + 4)
    found = replay(present, states[6], run.terms, CONFIG)
    assert [entry.slot for entry in found.blamed] == ["r1c0", "r0c0"]
    assert found.skip == Skip(first_step=present.governor.healthy_step, count=8)
    after = found.outcome.state.governor
    assert after.skips == (Skip(first_step=3, count=7), found.skip)
    assert after.cursor(10**6) == 10**6 + 15
    assert after.replays == 2


def test_what_was_spent_stays_spent_and_the_rest_is_the_generations() -> None:
    run, states = two_blended()
    present = replace(run.state, samples=10**6, flops=10**9, proposals=77, births=9)
    target = states[2]
    after = replay(present, target, run.terms, CONFIG).outcome.state
    assert (after.samples, after.flops, after.proposals, after.births) == (10**6, 10**9, 77, 9)
    kept = replace(after, samples=target.samples, flops=target.flops, proposals=target.proposals, births=target.births)
    differing = {name for name in RunState.__dataclass_fields__ if getattr(kept, name) != getattr(target, name)}
    assert differing == {"governor", "slots", "germinations", "steering"}
    assert replace(after.steering, rollbacks=0, barred=()) == target.steering, "of orders, only what is not taken again"
    assert after.steering.rollbacks == target.steering.rollbacks + 1
    assert after.slot("r0c1") == target.slot("r0c1")


def test_a_slot_is_barred_until_its_time_is_over_and_on_trial_one_seed_is_watched() -> None:
    run, states = two_blended()
    run.state = replay(run.state, states[0], run.terms, CONFIG).outcome.state
    until = run.state.tick + CONFIG.embargo_ticks
    reasons = {}
    while run.state.tick < until:
        tick(run, germinate("r1c0"), germinate("r0c0"))
        refused = {e.command.slot: e.reason for e in run.out.events if type(e).kind == "refusal"}
        reasons[run.state.tick] = refused
        assert refused["r1c0"].startswith("barred" if run.state.tick < until else "breaker on trial")
    first = states[0].tick
    assert reasons[first + 1]["r0c0"] == f"breaker cooling, {CONFIG.cool_ticks - 1} ticks left"
    assert reasons[first + 1]["r1c0"] == f"barred after a rollback, {CONFIG.embargo_ticks - 1} ticks left"
    cooled = first + CONFIG.cool_ticks
    assert "r0c0" not in reasons[cooled], "one seed is tried"
    assert run.state.governor.breaker.on_trial == "r0c0"
    assert run.state.governor.barred == {}


def test_the_record_survives_plain_data_and_every_field_enters_the_digest() -> None:
    run, states = two_blended()
    state = replay(run.state, states[4], run.terms, CONFIG).outcome.state
    assert from_plain(RunState, to_plain(state)) == state
    digest = digest62(state)
    changes: dict[str, Any] = {
        "verdict": Verdict.SUSPECT,
        "symptom": Symptom.COLLAPSE,
        "words": "x",
        "train": RunHealth().train,
        "validation": replace(RunHealth().validation, least=1.0),
        "strikes": 9,
        "healthy_tick": 99,
        "healthy_step": 99,
        "replays": 9,
        "trouble_tick": 99,
        "skips": (Skip(first_step=1, count=1),),
        "barred": {},
        "breaker": RunHealth().breaker,
    }
    assert set(changes) == set(RunHealth.__dataclass_fields__)
    for name, value in changes.items():
        assert digest62(replace(state, governor=replace(state.governor, **{name: value}))) != digest, name
