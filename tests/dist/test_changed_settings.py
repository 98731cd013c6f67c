"""A run that ended as diverged, and its ways out: whole workers on two ranks, resumed under other settings.

The training samples of two optimizer steps drive the loss away, and no replay is allowed.
"""

from pathlib import Path
from typing import Any

import pytest

from esper.config.tree import load_config, write_config
from esper.launcher.resume import branch, change_settings
from esper.tolaria.checkpoint.store import CheckpointStore
from tests.dist.test_governor_resume import STEPS, events_of, plain_of, spoiled
from tests.support.killed_runs import live, prepare_run


def change(run_dir: Path, *settings: str) -> None:
    """Changes config.yaml as a resume with these settings does."""
    _, plain = load_config(run_dir / "config.yaml")
    change_settings(plain, settings)
    write_config(run_dir / "config.yaml", plain)


def told(run_dir: Path) -> list[tuple[Any, ...]]:
    found = [r["payload"] | {"attempt": r["attempt"]} for r in events_of(run_dir, "settings_changed")]
    return [(r["attempt"], r["key"], r["before"], r["after"]) for r in found]


@pytest.fixture
def diverged(tmp_path: Path) -> Path:
    run_dir = prepare_run(tmp_path / "run", plain_of(governor__max_replays=0))
    assert live(run_dir, 2, prepare=spoiled) == [79, 79]
    return run_dir


def test_a_resume_without_a_governor_goes_on_to_the_end(diverged: Path) -> None:
    assert live(diverged, 2, prepare=spoiled) == [79, 79], "as it is it comes to the same"
    change(diverged, "governor.enabled=false", "telemetry.console=off")
    assert live(diverged, 2, prepare=spoiled) == [0, 0]
    assert (3, "governor.enabled", True, False) in told(diverged)
    assert events_of(diverged, "panic", attempt=3) == []
    assert CheckpointStore.of_run(diverged).steps()[0] == STEPS


def test_a_resume_with_other_limits_has_its_replays_anew(diverged: Path) -> None:
    change(diverged, "governor.max_replays=2", "checkpoint.keep=30")
    assert live(diverged, 2, prepare=spoiled) == [0, 0]
    assert told(diverged) == [(2, "checkpoint.keep", 40, 30), (2, "governor.max_replays", 0, 2)]
    assert len(events_of(diverged, "rollback", attempt=2)) == 1


def test_so_does_a_branch_from_an_earlier_checkpoint(diverged: Path, tmp_path: Path) -> None:
    branch(diverged, 20, tmp_path / "new")
    change(tmp_path / "new", "governor.max_replays=2")
    assert live(tmp_path / "new", 2, prepare=spoiled) == [0, 0]
    assert [line[1:] for line in told(tmp_path / "new")] == [("governor.max_replays", 0, 2)]
