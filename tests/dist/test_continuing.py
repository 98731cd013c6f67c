"""A continuation in copies goes over ticks: killed or stopped in the middle of it and resumed, the run is the one that
nobody disturbed, bit for bit, on two ranks. A stop ends within one piece."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from esper.accord import reducer
from esper.accord.evidence.continuing import begin
from esper.accord.state import Continuing, RunState, Terms
from esper.kasmina.hosts import registry
from esper.leyline.stages import Stage
from esper.nissa.reading import read_events
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.growth.continuation import Continuation
from tests.support.killed_runs import Kill, assert_same_run, final, live, prepare_run
from tests.support.noisy_host import NoisyConfig, register_noisy
from tests.support.tiny import act, schedule, tiny_plain

WORLD, ASKED, PIECES, STEPS = 2, 8, 6, 6  # ranks, tick, ticks that the copies take, steps of each copy
PIECE = 4 * STEPS // PIECES
BESIDE = "r1c0"


@pytest.fixture(autouse=True)
def _noisy_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "HOSTS", dict(registry.HOSTS))
    register_noisy()


def plain() -> dict[str, Any]:
    """A seed holds from tick 7 on; another one is born, and pruned, while it is continued."""
    births = [act(1, "r0c0", "GERMINATE", blueprint="conv_light", ticks=1)]
    births += [act(tick, "r0c0", "ADVANCE") for tick in (3, 6)]
    births += [act(8, BESIDE, "GERMINATE", blueprint="conv_small", ticks=3), act(10, BESIDE, "ADVANCE")]
    return tiny_plain(
        "cnn",
        host=NoisyConfig(),
        controller=schedule(*births, act(12, BESIDE, "PRUNE")),
        slots__incubation="immediate",
        trainer__steps=2 * 16,
        control__every=2,
        gates__baseline="continued",
        gates__continue_steps=STEPS,
        gates__continue_piece=PIECE,
        checkpoint__every_ticks=3,
        checkpoint__keep=9,
        telemetry__level="full",
    )


def ask_at(tick: int) -> None:
    """Has a continuation asked for at a tick; in so short a run no evidence could be enough for it."""

    def due(state: RunState, terms: Terms) -> Continuing | None:
        if state.continued_slot() is not None:
            return state.continuing
        held = [entry.slot for entry in state.slots if entry.stage is Stage.HOLDING]
        return begin(state, held[0], terms) if state.tick == tick and held else None

    reducer.next_continuation = due


def prepare(rank: int) -> None:
    ask_at(ASKED)


def stop(rank: int) -> None:
    """Has rank 1 told to stop in the middle of the fourth piece."""
    prepare(rank)
    real = Continuation.advance

    def advance(course: Continuation, until: int) -> dict[str, float]:
        if rank != 1 or until != 4 * PIECE:
            return real(course, until)
        first = real(course, until - 1)
        os.kill(os.getpid(), signal.SIGTERM)
        rest = real(course, until)
        return {name: value + rest[name] for name, value in first.items()}

    Continuation.advance = advance  # type: ignore[method-assign]


def test_killed_and_stopped_on_its_way_it_comes_to_the_same_bits(tmp_path: Path) -> None:
    calm = prepare_run(tmp_path / "calm" / "run", plain())
    assert live(calm, WORLD, prepare=prepare) == [0] * WORLD
    wanted = final(calm)
    (told,) = [event for event in read_events(calm / "events.jsonl") if event["kind"] == "continued"]
    assert told["tick"] == ASKED + PIECES
    assert told["payload"]["last"] is not None

    run = prepare_run(tmp_path / "run", plain())
    live(run, WORLD, Kill("measure", ASKED + 2, rank=1), prepare)  # after the first piece; nothing of it is saved
    live(run, WORLD, Kill("before-commit", ASKED + 4, rank=0), prepare)  # after the third; the first is saved
    live(run, WORLD, prepare=stop)
    status = json.loads((run / "STATUS.json").read_text())
    assert (status["status"], status["step"]) == ("preempted", 2 * (ASKED + 4)), "at the end of that very piece"
    store = CheckpointStore(run / "checkpoints", attempt=1, keep=9)
    saved = store.load(store.steps()[0], "state.pt")
    assert saved["continuation"]["step"] == 2 * (ASKED + 1)
    assert saved["run_state"]["continuing"]["done"] == 4 * PIECE
    assert live(run, WORLD, prepare=prepare) == [0] * WORLD
    assert_same_run(final(run), wanted)
