"""Rollbacks, and what else can happen then: a kill in their midst, a resume with nothing in memory, a stop at the tick.

Whole workers in a run directory, killed with SIGKILL. The training samples of two optimizer steps drive the loss away.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from esper.accord.breaker import BreakerOrder
from esper.config.tree import load_config
from esper.launcher.resume import make_order
from esper.leyline.breaker import BreakerPhase
from esper.leyline.errors import CheckpointError, ConfigError
from esper.nissa.reading import keep_latest, read_events
from esper.run import train
from esper.run.directory import read_order, write_order
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.training.engine import Engine
from tests.support.diverging_runs import GUARDED, PLAIN, register_bomb, spoil_data
from tests.support.killed_runs import Kill, assert_same_run, final, live, prepare_run
from tests.support.tiny import act, schedule, tiny_plain

STEPS, EVERY, BAD = 56, 2, range(40, 42)
PANIC, BACK = 22, 18  # ticks: of the panic, and of the generation gone back to


def plain_of(**settings: Any) -> dict[str, Any]:
    """Saved at every second tick, with a snapshot in memory at the same ones; a seed incubates all the while."""
    wanted = {
        "host": PLAIN,
        "trainer__steps": STEPS,
        "control__every": EVERY,
        **GUARDED,
        "checkpoint__every_ticks": 2,
        "checkpoint__keep": 40,
        "controller": schedule(
            act(6, "r0c0", "GERMINATE", blueprint="norm", ticks=2),
            act(8, "r0c0", "ADVANCE"),
            act(25, "r1c0", "GERMINATE", blueprint="norm", ticks=2),
        ),
    }
    return tiny_plain("cnn", **{**wanted, **settings})


def spoiled(rank: int) -> None:
    """Each worker's training part is spoiled once its engine stands."""
    own = train.assemble

    def assemble(*args: Any, **parts: Any) -> Engine:
        engine = own(*args, **parts)
        spoil_data(engine, BAD, 1e3)
        return engine

    train.assemble = assemble  # type: ignore[attr-defined]


def spoiled_and_stopped(rank: int) -> None:
    """Besides, the last rank is asked to stop in the step before the panic."""
    spoiled(rank)
    mark = Heartbeat.mark

    def marked(self: Heartbeat, phase: str, error: str = "") -> None:
        mark(self, phase, error)
        if phase == "step" and self.step == PANIC * EVERY - 1 and rank == 1 and not asked:
            asked.append(True)
            os.kill(os.getpid(), signal.SIGUSR1)

    asked: list[bool] = []
    Heartbeat.mark = marked  # type: ignore[method-assign]


def events_of(run_dir: Path, kind: str, attempt: int | None = None) -> list[dict[str, Any]]:
    records = read_events(run_dir / "events.jsonl")
    return [r for r in records if r["kind"] == kind and attempt in (None, r["attempt"])]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two ranks with one rollback; nobody changes this folder."""
    run_dir = prepare_run(tmp_path_factory.mktemp("undisturbed") / "run", plain_of())
    assert live(run_dir, 2, prepare=spoiled) == [0, 0]
    (back,) = events_of(run_dir, "rollback")
    assert (back["tick"], back["payload"]["source"], back["payload"]["to_tick"]) == (PANIC, "ram", BACK)
    return run_dir


def test_a_run_with_a_rollback_reads_as_one_life(undisturbed: Path) -> None:
    """What a reader takes for the run: every tick once, the healthy one; the panic is told all the same."""
    records = keep_latest(read_events(undisturbed / "events.jsonl"))
    ticks = [r for r in records if r["kind"] == "tick"]
    assert [r["tick"] for r in ticks] == list(range(1, STEPS // EVERY + 1))
    assert max(r["payload"]["train_loss"]["value"] for r in ticks) < 3.0
    assert [r["tick"] for r in records if r["kind"] in ("panic", "rollback")] == [PANIC, PANIC]
    saved = CheckpointStore(undisturbed / "checkpoints", attempt=1, keep=1).steps()
    assert saved == list(range(STEPS, 0, -2 * EVERY))
    assert [path.name for path in (undisturbed / "checkpoints").glob("aside-*")] == ["aside-00000040"]


@pytest.mark.parametrize(
    "kill", [pytest.param(Kill("rollback", PANIC, rank=1), marks=pytest.mark.slow), Kill("gone-back", BACK, rank=0)]
)
def test_killed_in_a_rollback_it_comes_to_the_same_panic_and_the_same_end(
    kill: Kill, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = prepare_run(tmp_path / "run", plain_of())
    live(run_dir, 2, kill, prepare=spoiled)
    assert live(run_dir, 2, prepare=spoiled) == [0, 0]
    assert_same_run(final(run_dir), final(undisturbed))
    assert [r["tick"] for r in events_of(run_dir, "panic")] == [PANIC] * 2
    assert len(events_of(run_dir, "rollback")) == 1


@pytest.mark.slow
def test_just_resumed_it_goes_back_to_a_checkpoint_that_was_confirmed(undisturbed: Path, tmp_path: Path) -> None:
    """Its memory holds the resumed state alone, which no healthy tick has confirmed; the one on disk is passed over."""
    run_dir = prepare_run(tmp_path / "run", plain_of(checkpoint__every_ticks=4))
    live(run_dir, 2, Kill("gone-back", BACK, rank=None), prepare=spoiled)
    store = CheckpointStore(run_dir / "checkpoints", attempt=1, keep=1)
    assert store.steps()[:2] == [40, 32]
    assert live(run_dir, 2, prepare=spoiled) == [0, 0]
    (back,) = events_of(run_dir, "rollback")
    assert (back["attempt"], back["payload"]["source"], back["payload"]["to_step"]) == (2, "disk", 32)
    assert back["payload"]["recovery_ms"] > 0
    assert back["payload"]["budget_ms"] == 12_000
    assert store.steps()[0] == STEPS


@pytest.mark.slow
def test_a_stop_at_the_panic_saves_what_it_went_back_to(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = prepare_run(tmp_path / "run", plain_of())
    assert live(run_dir, 2, prepare=spoiled_and_stopped) == [0, 0]
    store = CheckpointStore(run_dir / "checkpoints", attempt=1, keep=1)
    assert store.steps()[0] == BACK * EVERY
    governor = store.load(store.steps()[0], "state.pt")["run_state"]["governor"]
    assert (governor["replays"], len(governor["skips"])) == (1, 1)
    assert live(run_dir, 2, prepare=spoiled) == [0, 0]
    assert len(events_of(run_dir, "panic")) == 1, "resumed in the midst of the replay"
    assert_same_run(final(run_dir), final(undisturbed))


# A seed that breaks at tick 18, its slot barred until tick 24, growth cooling until 20, then on trial until 29.
BOMB = (
    act(14, "r0c0", "GERMINATE", blueprint="bomb", ticks=2),
    act(16, "r0c0", "ADVANCE"),
    act(18, "r0c0", "ADVANCE"),
    act(24, "r0c0", "GERMINATE", blueprint="norm", ticks=1),
    act(26, "r0c0", "ADVANCE"),
    act(27, "r0c0", "ADVANCE"),
)


def with_bomb(rank: int) -> None:
    register_bomb()


@pytest.mark.slow
def test_killed_while_barred_and_on_trial_it_goes_on_where_it_stood(tmp_path: Path) -> None:
    settings = {
        "trainer__steps": 64,
        "governor__cool_ticks": 4,
        "governor__trial_ticks": 2,
        "governor__embargo_ticks": 8,
        "controller": schedule(*BOMB),
        "gates__birth_k_se": 1e9,
    }
    runs = [prepare_run(tmp_path / name, plain_of(**settings)) for name in ("whole", "killed")]
    assert live(runs[0], 2, prepare=with_bomb) == [0, 0]
    turns = [(r["tick"], r["payload"]["target"]) for r in events_of(runs[0], "breaker")]
    assert [target for _, target in turns] == ["COOLING", "TRIAL", "ALLOWED"]
    cooled, tried = turns[1][0], turns[2][0]
    assert cooled < 23 < tried - 1
    for kill in (Kill("measure", 23, rank=0), Kill("apply", tried - 1, rank=1)):
        live(runs[1], 2, kill, prepare=with_bomb)
    assert live(runs[1], 2, prepare=with_bomb) == [0, 0]
    assert_same_run(final(runs[1]), final(runs[0]))


def ordered(run_dir: Path) -> BreakerOrder:
    """Gives the order that growth may go on, as `esper resume --breaker allowed` does."""
    order = make_order(run_dir, load_config(run_dir / "config.yaml")[0], BreakerPhase.ALLOWED)
    write_order(run_dir, order)
    return order


def turns_of(run_dir: Path) -> list[tuple[int, str, bool]]:
    return [(r["attempt"], r["payload"]["target"], r["payload"]["manual"]) for r in events_of(run_dir, "breaker")]


def test_an_order_given_between_two_attempts_turns_the_breaker_once_and_on_all_ranks(tmp_path: Path) -> None:
    """Killed while growth cools, ordered to allow it; killed again before anything is saved, and after."""
    settings = {
        "trainer__steps": 64,
        "governor__cool_ticks": 40,
        "governor__embargo_ticks": 8,
        "controller": schedule(*BOMB),
        "gates__birth_k_se": 1e9,
    }
    run_dir = prepare_run(tmp_path / "run", plain_of(**settings))
    with pytest.raises(CheckpointError, match="no checkpoint to go on from"):
        ordered(run_dir)
    live(run_dir, 2, Kill("measure", 23, rank=0), prepare=with_bomb)
    ordered(run_dir)
    live(run_dir, 2, Kill("measure", 23, rank=1), prepare=with_bomb)
    live(run_dir, 2, Kill("measure", 29, rank=0), prepare=with_bomb)
    assert live(run_dir, 2, prepare=with_bomb) == [0, 0]
    allowed = [(attempt, "ALLOWED", True) for attempt in (2, 3)]
    assert turns_of(run_dir) == [(1, "COOLING", False), *allowed], "not again after a save"
    births = [r for r in events_of(run_dir, "stage") if r["payload"]["target"] == "GERMINATED" and r["attempt"] > 2]
    assert births, "40 ticks of cooling would have outlasted the run"


def test_an_order_does_not_undo_what_came_after_it_when_the_run_goes_back_to_where_it_was_given(tmp_path: Path) -> None:
    """Given before the bomb is born: the rollback goes to before the panic, trips the breaker, and saves there."""
    settings = {"trainer__steps": 64, "governor__cool_ticks": 40, "controller": schedule(*BOMB)}
    settings["gates__birth_k_se"] = 1e9
    run_dir = prepare_run(tmp_path / "run", plain_of(**settings))
    live(run_dir, 2, Kill("measure", PANIC - 3, rank=0), prepare=with_bomb)
    order = ordered(run_dir)
    given_at = CheckpointStore(run_dir / "checkpoints", attempt=0, keep=1).steps()[0]
    live(run_dir, 2, Kill("measure", 26, rank=0), prepare=with_bomb)
    (back,) = events_of(run_dir, "rollback")
    assert back["payload"]["to_step"] <= given_at, "else this shows nothing"
    assert live(run_dir, 2, prepare=with_bomb) == [0, 0]
    assert turns_of(run_dir) == [(2, "ALLOWED", True), (2, "COOLING", False)]
    store = CheckpointStore(run_dir / "checkpoints", attempt=0, keep=1)
    breaker = store.load(store.steps()[0], "state.pt")["run_state"]["governor"]["breaker"]
    assert (breaker["phase"], breaker["trips"], breaker["obeyed"]) == ("COOLING", 1, order.id)


def test_a_run_that_begins_anew_takes_note_of_an_old_order_and_does_nothing(tmp_path: Path) -> None:
    run_dir = prepare_run(tmp_path / "run", plain_of(trainer__steps=8))
    write_order(run_dir, BreakerOrder(id="old", phase=BreakerPhase.OPEN, why="of another life"))
    live(run_dir, 2, Kill("measure", 3, rank=0))
    assert live(run_dir, 2) == [0, 0]
    assert turns_of(run_dir) == []


def test_an_order_that_is_none_is_named_and_a_run_without_a_governor_takes_none(tmp_path: Path) -> None:
    run_dir = prepare_run(tmp_path / "run", plain_of(governor__enabled=False))
    with pytest.raises(ConfigError, match=r"governor.enabled=false"):
        ordered(run_dir)
    assert read_order(run_dir) is None
    (run_dir / "breaker.json").write_text('{"phase": "ALLOWED"}')
    with pytest.raises(ConfigError, match=r"breaker.json: no order to the breaker .*missing id, why"):
        read_order(run_dir)
