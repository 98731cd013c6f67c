"""A run that is done is made longer: with a constant rate it is, bit for bit, the run that was long from the beginning.

A seed is halfway through its ramp where the shorter run ends, and another is born after that.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from esper.config.tree import Resume, RunConfig, load_config
from esper.launcher.resume import change_settings
from esper.run.directory import hold_run, read_status
from esper.tolaria.checkpoint.store import CheckpointStore
from tests.dist.test_governor_resume import events_of
from tests.support.killed_runs import assert_same_run, final, live, prepare_run
from tests.support.tiny import act, schedule, tiny_plain

SHORT, LONG, EVERY = 24, 40, 2


def plain_of(**settings: Any) -> dict[str, Any]:
    wanted: dict[str, Any] = {
        "trainer__steps": SHORT,
        "control__every": EVERY,
        "optim__schedule": "constant",
        "telemetry__level": "full",
        "checkpoint__every_ticks": SHORT // EVERY,  # from three ranks on a save is part of the bits: it re-wraps
        "controller": schedule(
            act(3, "r0c0", "GERMINATE", blueprint="norm", ticks=9),
            act(5, "r0c0", "ADVANCE"),
            act(7, "r0c0", "ADVANCE"),
            act(14, "r1c0", "GERMINATE", blueprint="norm", ticks=2),
        ),
    }
    return tiny_plain("cnn", **{**wanted, **settings})


def extend(run_dir: Path, *changes: str) -> None:
    """What ``esper resume`` does before it starts the ranks."""
    _, plain = load_config(run_dir / "config.yaml")
    change_settings(plain, changes)
    with hold_run(RunConfig(dir=str(run_dir), resume=Resume.MUST), plain):
        pass


def test_it_is_the_run_that_was_long_from_the_beginning(tmp_path: Path) -> None:
    short, long = (prepare_run(tmp_path / n, plain_of(trainer__steps=s)) for n, s in (("short", SHORT), ("long", LONG)))
    assert live(long, 2) == [0, 0]
    assert live(short, 2) == [0, 0]
    first = (short / "result.json").read_bytes()
    ramps = [r for r in events_of(short, "tick") if r["step"] == SHORT]
    assert 0.0 < ramps[0]["payload"]["slots"][0]["alpha"] < 1.0, "a ramp is in flight at the end"
    extend(short, f"trainer.steps={LONG}")
    assert not (short / "result.json").exists()
    assert live(short, 2) == [0, 0]
    assert (short / f"result-{SHORT:08d}.json").read_bytes() == first
    assert_same_run(final(short), final(long))
    told = [r["payload"] for r in events_of(short, "extended")]
    assert [(e["before"], e["after"], e["lr_before"] == e["lr_after"]) for e in told] == [(SHORT, LONG, True)]
    assert events_of(long, "extended") == []


def test_a_schedule_over_the_length_goes_on_as_the_longer_one(tmp_path: Path) -> None:
    """Epochs are the length here; the rates are checked against the formula of a cosine."""
    settings = {"trainer__steps": None, "trainer__epochs": 1, "trainer__batch": 200, "optim__schedule": "cosine"}
    run_dir = prepare_run(tmp_path / "run", plain_of(**settings, optim__final_lr_fraction=0.0))
    assert live(run_dir, 1) == [0]
    steps = CheckpointStore.of_run(run_dir).steps()[0]
    extend(run_dir, "trainer.epochs=2", "checkpoint.keep=2")
    status, _ = read_status(run_dir)
    assert status is not None
    assert (status["status"], status["exit_code"], status["step"]) == ("preempted", 75, steps)
    assert live(run_dir, 1) == [0]
    assert json.loads((run_dir / "result.json").read_text())["step"] == 2 * steps
    (told,) = (r["payload"] for r in events_of(run_dir, "extended"))
    assert (told["before"], told["after"], told["lr_before"]) == (steps, 2 * steps, 0.0)
    assert told["lr_after"] == pytest.approx(0.01 * 0.5)  # half way along the cosine
    last = events_of(run_dir, "tick", attempt=2)[-1]["payload"]["lr"]
    assert last == pytest.approx(0.01 * 0.5 * (1 + math.cos(math.pi * (2 * steps - 1) / (2 * steps))))
