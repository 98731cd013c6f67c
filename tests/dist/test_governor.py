"""Runs that fall ill and are taken back, by their real config, on one and two ranks with data of their own.

Bitwise: the ranks after a rollback; the replay against a fresh process group that loads the same generation from disk
and does the same otherwise; a healthy run with the governor on against the same with it off.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.accord.replay import replay
from esper.config.tree import EsperConfig
from esper.kasmina.hosts import registry
from esper.leyline.breaker import BreakerPhase
from esper.leyline.errors import DivergedError
from esper.leyline.events import (
    BreakerChanged,
    CommandRefused,
    Event,
    Panic,
    RolledBack,
    SnapshotTaken,
    StageChanged,
    StepSkipped,
    TickDone,
)
from esper.leyline.stages import Mechanical
from esper.tamiyo.heuristic_config import HeuristicConfig
from esper.tolaria.training.engine import Engine
from esper.tolaria.training.governor import Recovery
from tests.support.collective_counter import CollectiveCounter
from tests.support.dist import run_distributed, use_group
from tests.support.diverging_runs import GUARDED, PLAIN, register_bomb, spoil_data
from tests.support.noisy_host import NoisyConfig, register_noisy
from tests.support.small_runs import before, train_on
from tests.support.tiny import act, bits, events, make_engine, replica, schedule, tiny_config


@pytest.fixture(autouse=True)
def _noisy_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "HOSTS", dict(registry.HOSTS))
    register_noisy()


STEPS, EVERY = 60, 2
WORLDS = (pytest.param(1, marks=pytest.mark.slow), 2)


def config_of(**settings: Any) -> EsperConfig:
    wanted = {
        "host": PLAIN,
        "trainer__steps": STEPS,
        "control__every": EVERY,
        **GUARDED,
        "governor__cool_ticks": 4,
        "governor__trial_ticks": 2,
        "governor__embargo_ticks": 8,
    }
    return tiny_config("cnn", **{**wanted, **settings})


def look(engine: Engine) -> dict[str, Any]:
    """Everything of this rank."""
    controller = None if engine.controller is None else engine.controller.state_dict()
    return {**replica(engine), "rng": bits([("cpu", torch.get_rng_state())]), "controller": controller}


def shared(found: dict[str, Any]) -> dict[str, Any]:
    """What must be equal on all ranks."""
    return {key: value for key, value in found.items() if key not in ("rng", "controller")}


def told(engine: Engine, *kinds: type) -> list[Any]:
    return [event for event in events(engine).events if isinstance(event, kinds)]


def note_recoveries(engine: Engine) -> list[tuple[Any, Recovery]]:
    """The states that panicked, and what was done."""
    found: list[tuple[Any, Recovery]] = []
    assert engine.governor is not None
    own = engine.governor.discard_later

    def noted(recovery: Recovery) -> list[Event]:
        found.append((present[-1], recovery))
        return own(recovery)

    present: list[Any] = []
    recover = engine.governor.find_recovery

    def asked(state: Any, **limits: Any) -> Recovery | None:
        present.append(state)
        return recover(state, **limits)

    engine.governor.discard_later, engine.governor.find_recovery = noted, asked  # type: ignore[method-assign]
    return found


# a window of samples ------------------------------------------------------------------------------------------------

BAD = range(40, 42)
GROWER = HeuristicConfig(warmup_ticks=2, life_ticks=3, tempo_ticks=1, blueprints=["conv_light", "norm"], patience=4)
# What falls ill, with what: a host that training tears apart; one that a NaN gets to though its step is skipped, by its
# statistics of the batch, and that draws random numbers for its dropout.
ILL: dict[str, tuple[dict[str, Any], float, str]] = {
    "plain": ({"governor__blame_ticks": 1}, 1e3, "DIVERGENCE"),
    "noisy": ({"host": NoisyConfig(), "governor__blame_ticks": 1}, float("nan"), "NONFINITE"),
}


def window_of_samples(rank: int, config: EsperConfig, run_dir: Path, factor: float) -> dict[str, Any]:
    """The run; then the generation that it went back to, loaded from disk by a process group that knows nothing else,
    replayed in the same way."""
    register_noisy()
    engine = make_engine(config, run_dir)
    spoil_data(engine, BAD, factor)
    engine.begin(None)
    recoveries = note_recoveries(engine)
    train_on(engine)
    engine.saver.finish({"step": engine.step, "tick": engine.state.tick, "epoch": 1}, 60.0)
    found = {"whole": look(engine), "events": events(engine).events, "recoveries": len(recoveries)}
    engine.world.close()
    present, recovery = recoveries[0]
    step = recovery.generation.state.step
    found["aside"] = sorted(path.name for path in (run_dir / "checkpoints").glob("aside-*"))
    if engine.world.size > 1:
        use_group(1)
    engine = make_engine(config, run_dir, attempt=2)
    spoil_data(engine, BAD, factor)
    engine.begin(step)
    again = replay(present, engine.state, engine.terms, config.governor).outcome
    engine.state = again.state
    engine.growth.perform(again.effects)
    engine.growth.follow(engine.state, force=True)
    train_on(engine)
    found["fresh"] = look(engine)
    engine.world.close()
    return found


@pytest.mark.parametrize(
    ("what", "world"),
    [
        pytest.param("plain", 1, marks=pytest.mark.slow),
        ("noisy", 2),
        pytest.param("noisy", 3, marks=pytest.mark.slow),
    ],
)
def test_samples_that_drive_the_loss_away_are_left_out(what: str, world: int, tmp_path: Path) -> None:
    settings, factor, symptom = ILL[what]
    config = config_of(checkpoint__every_ticks=2, checkpoint__keep=40, controller=GROWER, **settings)
    results = run_distributed(window_of_samples, world, config, tmp_path, factor, groups=2)
    found = results[0]
    panic, back = (next(e for e in found["events"] if isinstance(e, kind)) for kind in (Panic, RolledBack))
    assert panic.symptom == symptom
    assert panic.step == back.step
    assert BAD.start < panic.step <= BAD.start + 3 * EVERY
    assert (back.source, back.replay, back.blamed) == ("ram", 1, ())
    assert (back.skipped_from, back.skipped_steps) == (BAD.start, panic.step - BAD.start)
    assert back.to_step < BAD.start
    assert found["recoveries"] == 1
    assert found["aside"], "a checkpoint of the sick time bears no checkpoint's name"
    seen = [(e.train_loss.value, e.validation_loss.value) for e in found["events"] if isinstance(e, TickDone)]
    ticks = (STEPS - back.to_step) // EVERY
    assert any(train is None or validation is None or train > 3.0 for train, validation in seen[:-ticks])
    assert all(train < 3.0 and validation < 3.0 for train, validation in seen[-ticks:]), "it went on below the panic"
    for mine in results:
        assert mine["whole"] == mine["fresh"], "from memory as from disk into a fresh process"
        assert shared(mine["whole"]) == shared(found["whole"])


def gone_back(rank: int, config: EsperConfig, run_dir: Path, alone: bool) -> dict[str, Any]:
    """A whole run that goes back, with snapshots that the ranks share, or with those of each rank."""
    register_noisy()
    if alone:
        os.environ["LOCAL_WORLD_SIZE"] = "1"
    engine = make_engine(config, run_dir)
    spoil_data(engine, BAD, float("nan"))
    engine.begin(None)
    assert engine.governor is not None
    train_on(engine)
    engine.world.close()
    went = [event.source for event in told(engine, RolledBack)]
    return {"whole": look(engine), "shares": engine.governor.ring.shares, "went": went}


@pytest.mark.slow
def test_shared_snapshots_come_to_the_bits_of_each_rank_s_own(tmp_path: Path) -> None:
    config = config_of(controller=GROWER, **ILL["noisy"][0])
    ours = run_distributed(gone_back, 2, config, tmp_path / "shared", False)
    own = run_distributed(gone_back, 2, config, tmp_path / "own", True)
    assert [found["went"] for found in ours] == [["ram"]] * 2
    assert [(a["shares"], b["shares"]) for a, b in zip(ours, own, strict=True)] == [(True, False)] * 2
    assert [found["whole"] for found in ours] == [found["whole"] for found in own]


def until_gone_back(rank: int, config: EsperConfig, run_dir: Path) -> tuple[list[int], int, list[int]]:
    """Checkpoints before the tick that rolls back, the step it goes back to, checkpoints once its save has landed."""
    engine = make_engine(config, run_dir)
    spoil_data(engine, BAD, 1e3)
    engine.begin(None)
    recoveries, earlier = note_recoveries(engine), []
    while not recoveries:
        engine.train_step()
        if engine.tick_due():
            engine.saver.wait(60.0)  # saves are written and committed in threads; a busy machine is slow to
            if engine.saver._landing is not None:
                engine.saver._landing.job.join()
            engine.world.meet("landing")
            earlier = engine.saver.store.steps()
            engine.tick()
    engine.saver.finish({"step": engine.step, "tick": engine.state.tick, "epoch": 1}, 60.0)
    engine.world.close()
    return earlier, recoveries[0][1].generation.state.step, engine.saver.store.steps()


def test_a_rollback_never_leaves_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    config = config_of(checkpoint__every_ticks=10, checkpoint__keep=1, governor__blame_ticks=1)
    for earlier, back, after in run_distributed(until_gone_back, 2, config, tmp_path):
        assert earlier
        assert back not in earlier, "else nothing would be shown"
        assert after[0] == back
        assert after[0] < earlier[0]


# a seed -------------------------------------------------------------------------------------------------------------

BOMB = (
    act(14, "r0c0", "GERMINATE", blueprint="bomb", ticks=2),
    act(16, "r0c0", "ADVANCE"),
    act(18, "r0c0", "ADVANCE"),
    act(15, "r1c0", "GERMINATE", blueprint="norm", ticks=1),
    act(21, "r0c0", "GERMINATE", blueprint="norm", ticks=1),
    act(22, "r1c0", "ADVANCE"),
    act(23, "r1c0", "ADVANCE"),
    act(24, "r0c0", "GERMINATE", blueprint="norm", ticks=1),
    act(26, "r0c0", "ADVANCE"),
    act(27, "r0c0", "ADVANCE"),
)


def seed_that_breaks(rank: int, config: EsperConfig, run_dir: Path) -> dict[str, Any]:
    register_bomb()
    engine = make_engine(config, run_dir)
    engine.begin(None)
    train_on(engine)
    engine.world.close()
    return {"whole": look(engine), "events": events(engine).events}


@pytest.mark.parametrize("world", WORLDS)
def test_the_newest_change_is_blamed_and_no_other_seed(world: int, tmp_path: Path) -> None:
    config = config_of(controller=schedule(*BOMB), gates__birth_k_se=1e9)  # else it would not be born
    results = run_distributed(seed_that_breaks, world, config, tmp_path)
    found = results[0]["events"]
    backs = [e for e in found if isinstance(e, RolledBack)]
    assert [(e.blamed, e.blamed_ticks, e.skipped_steps) for e in backs] == [(("r0c0",), (18,), 0)]
    gone = [e for e in found if isinstance(e, StageChanged) and e.cause == Mechanical.ROLLBACK.name]
    assert [(e.slot, e.blueprint) for e in gone] == [("r0c0", "bomb")]
    turns = [(e.source, e.target) for e in found if isinstance(e, BreakerChanged)]
    assert turns[0] == (BreakerPhase.ALLOWED, BreakerPhase.COOLING)
    assert [source for source, _ in turns[1:]] == [target for _, target in turns[:-1]]
    refused = [e for e in found if isinstance(e, CommandRefused) and e.tick == 21]
    assert "barred after a rollback" in refused[-1].reason
    state = results[0]["whole"]["state"]
    assert [slot["stage"] for slot in state["slots"]] == ["BLENDING", "BLENDING"]
    assert turns[-1] == (BreakerPhase.TRIAL, BreakerPhase.ALLOWED)
    losses = [e.train_loss.value for e in found if isinstance(e, TickDone)]
    assert max(losses) > 10.0
    assert max(losses[-5:]) < 2.0
    for mine in results:
        assert shared(mine["whole"]) == shared(results[0]["whole"])


INF = (
    act(3, "r0c0", "GERMINATE", blueprint="conv_small", ticks=2),
    act(5, "r0c0", "ADVANCE"),
    act(7, "r0c0", "ADVANCE"),
)


def seed_that_turns_inf(rank: int, config: EsperConfig, run_dir: Path) -> dict[str, Any]:
    engine = make_engine(config, run_dir)
    engine.begin(None)

    def break_it() -> None:
        seed = engine.grown.slots["r0c0"].seed
        assert seed is not None
        with torch.no_grad():
            next(seed.parameters()).fill_(torch.inf)

    before(engine, "train_step", break_it, at_step=31)
    train_on(engine)
    engine.world.close()
    return {"whole": look(engine), "events": events(engine).events}


def test_a_blended_seed_that_turns_inf_is_taken_out_and_nothing_is_taken_back(tmp_path: Path) -> None:
    """The weights stand, since their steps are skipped: the reducer's own answer comes first."""
    config = config_of(trainer__max_skips=2, controller=schedule(*INF))
    results = run_distributed(seed_that_turns_inf, 2, config, tmp_path)
    found = results[0]["events"]
    gone = [e for e in found if isinstance(e, StageChanged) and e.cause == Mechanical.QUARANTINE.name]
    assert [(e.slot, e.source.name) for e in gone] == [("r0c0", "BLENDING")]
    assert sum(e.count for e in found if isinstance(e, StepSkipped)) == 2
    assert not [e for e in found if isinstance(e, Panic | RolledBack | BreakerChanged)]
    losses = [e.train_loss.value for e in found if isinstance(e, TickDone)]
    assert losses[-1] is not None
    assert losses[-1] < 2.0
    for mine in results:
        assert shared(mine["whole"]) == shared(results[0]["whole"])


# numbers that are none ----------------------------------------------------------------------------------------------


def samples_that_are_not_numbers(rank: int, config: EsperConfig, run_dir: Path) -> dict[str, Any]:
    """The last rank's share of ten steps is NaN."""
    engine = make_engine(config, run_dir)
    batch = config.trainer.batch
    spoil_data(engine, range(30, 40), float("nan"), share=slice(batch - batch // engine.world.size, None))
    engine.begin(None)
    train_on(engine)
    engine.world.close()
    return {"whole": look(engine), "events": events(engine).events}


def test_a_row_of_losses_that_are_not_finite_on_one_rank(tmp_path: Path) -> None:
    results = run_distributed(samples_that_are_not_numbers, 2, config_of(), tmp_path)
    found = results[0]["events"]
    assert {e.ranks for e in found if isinstance(e, StepSkipped)} == {(1,)}
    panics = [e for e in found if isinstance(e, Panic)]
    backs = [e for e in found if isinstance(e, RolledBack)]
    assert {(e.symptom, e.healthy_step) for e in panics} == {("NONFINITE", 30)}
    assert [(e.replay, e.skipped_from) for e in backs] == [(n + 1, 30) for n in range(len(backs))]
    assert [e.to_step for e in backs] == [28, 24], "the second goes one generation further back"
    assert [e.skipped_steps for e in backs] == [5, 10], "each replay leaves out twice as many"
    assert shared(results[0]["whole"]) == shared(results[1]["whole"])
    assert results[0]["whole"]["state"]["governor"]["replays"] == 0, "it has recovered"


def nothing_but_nan(rank: int, config: EsperConfig, run_dir: Path) -> str:
    engine = make_engine(config, run_dir)
    spoil_data(engine, range(2, STEPS), float("nan"))
    engine.begin(None)
    with pytest.raises(DivergedError) as caught:
        train_on(engine)
    engine.world.close()
    assert not [e for e in events(engine).events if isinstance(e, RolledBack)]
    return str(caught.value)


@pytest.mark.slow
def test_with_nothing_to_go_back_to_skipped_steps_end_the_run_as_ever(tmp_path: Path) -> None:
    """The first tick is sick already: what the run began with was never confirmed."""
    config = config_of(control__every=4, trainer__max_skips=2, trainer__max_consecutive=7)
    texts = run_distributed(nothing_but_nan, 2, config, tmp_path)
    assert texts[0].startswith("diverged: 7 optimizer steps in a row had a non-finite host gradient")
    assert "the loss was not finite on rank 0, 1" in texts[0]
    assert texts[0] == texts[1]


# a rate that no replay cures ----------------------------------------------------------------------------------------


def rate_too_high(rank: int, config: EsperConfig, run_dir: Path) -> dict[str, Any]:
    engine = make_engine(config, run_dir)
    engine.begin(None)
    with pytest.raises(DivergedError) as caught:
        train_on(engine)
    engine.world.close()
    return {"error": str(caught.value), "code": caught.value.exit_code, "events": events(engine).events}


@pytest.mark.parametrize("world", WORLDS)
def test_what_no_replay_cures_ends_as_diverged(world: int, tmp_path: Path) -> None:
    config = config_of(
        optim__lr=40.0, optim__warmup_steps=STEPS - 1, optim__schedule="constant", governor__max_replays=2
    )
    results = run_distributed(rate_too_high, world, config, tmp_path)
    found = results[0]
    assert found["code"] == 79
    assert "after 2 replays (governor.max_replays) it came to this again" in found["error"]
    assert {mine["error"] for mine in results} == {found["error"]}
    backs = [e for e in found["events"] if isinstance(e, RolledBack)]
    assert [e.replay for e in backs] == [1, 2]
    assert len([e for e in found["events"] if isinstance(e, Panic)]) == 3


# health -------------------------------------------------------------------------------------------------------------

GROWTH = (
    act(3, "r0c0", "GERMINATE", blueprint="conv_small", ticks=2),
    act(5, "r0c0", "ADVANCE"),
    act(7, "r0c0", "ADVANCE"),
    act(10, "r0c0", "ADVANCE"),
    act(6, "r1c0", "GERMINATE", blueprint="norm", ticks=1),
    act(12, "r1c0", "PRUNE"),
)


def with_and_without(rank: int, config: EsperConfig, run_dir: Path) -> dict[str, Any]:
    """The same run with the governor on and off: everything of it, its events, and the collectives of its ticks."""
    found: dict[str, Any] = {}
    for number, enabled in enumerate((True, False)):
        if config.world.nproc_per_node > 1:
            use_group(number)
        own = replace(config, governor=replace(config.governor, enabled=enabled))
        engine = make_engine(own, run_dir / str(enabled))
        engine.begin(None)
        tick: Callable[[], None] = engine.tick
        counts = []

        def counted(tick: Callable[[], None] = tick, counts: list[Any] = counts) -> None:
            with CollectiveCounter() as counter:
                tick()
            counts.append(counter.kinds())

        engine.tick = counted  # type: ignore[method-assign]
        train_on(engine)
        whole = look(engine)
        del whole["state"]["governor"]
        found[str(enabled)] = (whole, counts, events(engine).events)
        engine.world.close()
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_a_healthy_run_is_the_same_bit_for_bit_with_the_governor_off(world: int, tmp_path: Path) -> None:
    config = config_of(world__nproc_per_node=world, controller=schedule(*GROWTH), optim__kind="adamw")
    for mine in run_distributed(with_and_without, world, config, tmp_path, groups=2):
        (on, on_counts, on_events), (off, off_counts, off_events) = mine["True"], mine["False"]
        assert on == off
        assert on_counts == off_counts
        taken = [e for e in on_events if isinstance(e, SnapshotTaken)]
        assert len(taken) == 1 + STEPS // EVERY // 2
        assert all(e.bytes > 0 for e in taken)
        assert not [e for e in on_events if isinstance(e, Panic | RolledBack | BreakerChanged)]
        assert not [e for e in off_events if isinstance(e, SnapshotTaken)]
        kinds = [[type(e) for e in some if not isinstance(e, SnapshotTaken)] for some in (on_events, off_events)]
        assert kinds[0] == kinds[1]
