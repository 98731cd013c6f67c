"""A run that is killed, stopped and undone by its user: each command goes on where the last one ended, bit for bit."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from esper.nissa.reading import keep_latest, read_events
from tests.e2e.conftest import Finished, Start
from tests.support.commands import ESPER, GROWING, NO_WANDB, TRAIN, Command, assert_gone, mark, saved
from tests.support.killed_runs import assert_same_run, final
from tests.support.wandb_file import offline_files, read_wandb_file

TICKS = 20


@pytest.fixture(scope="module")
def wanted(grown: Finished) -> dict[str, Any]:
    """What the run came to that nobody disturbed."""
    return final(grown.run)


def without_saves(outcome: dict[str, Any]) -> dict[str, Any]:
    """A stop adds a save of its own, and so a re-wrap; all else must be as it was."""
    events = [event for event in outcome["plain"]["events"] if event[0] != "rewrap"]
    return {**outcome, "plain": {**outcome["plain"], "events": events}}


def status_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "STATUS.json").read_text())
    return found


def attempts(run: Path) -> list[tuple[int, int | None]]:
    """Number of each attempt, and the step that it began at."""
    return [
        (record["attempt"], record["payload"]["resumed_from"])
        for record in read_events(run / "events.jsonl")
        if record["kind"] == "run_started"
    ]


def stop(command: Command, run: Path, signals: tuple[int, ...], tick: int) -> None:
    """Sends the launcher signals while the run stands still at a tick; returns when it has ended as a stopped one."""
    command.until(lambda: mark(run).tick >= tick, f"tick {tick}")
    with command.held(run):
        for signum in signals:
            command.process.send_signal(signum)
            command.until(lambda: "workers save at the next tick" in command.err, "its word")
        time.sleep(0.1)  # the workers are told in the same breath
    assert command.end() == 75, command.told()


@pytest.mark.slow  # torchrun starts killed ranks again in tests/faults/test_bad_day.py, too
def test_a_killed_worker_is_started_again_by_torchrun(start: Start, tmp_path: Path, wanted: dict[str, Any]) -> None:
    run = tmp_path / "run"
    command = start(TRAIN, *GROWING, NO_WANDB, "world.max_restarts=1", "run.dir=run")
    command.until(saved(run, 96), "the checkpoint of step 96")
    os.kill(command.worker(run, rank=1), signal.SIGKILL)
    assert command.end() == 0, command.told()
    assert "esper: rank 0: lost contact" in command.err, command.told()
    assert "resumed from step" in command.out
    assert_gone(command, run)
    (_, first), (number, resumed) = attempts(run)
    assert first is None
    assert number == 2
    assert resumed is not None
    assert resumed >= 96
    assert_same_run(final(run), wanted)


def test_stopped_then_killed_it_goes_on_and_leaves_nobody_behind(
    start: Start, tmp_path: Path, wanted: dict[str, Any]
) -> None:
    """SIGUSR1 as Slurm sends it before the time is up, then SIGTERM: it saves at the next tick. Resumed, its launcher
    is killed. Resumed once more, it comes to its end, and wandb goes on in one run."""
    run = tmp_path / "run"
    first = start(TRAIN, *GROWING, "run.dir=run")
    stop(first, run, (signal.SIGUSR1, signal.SIGTERM), tick=5)
    status = status_of(run)
    assert (status["status"], status["exit_code"]) == ("preempted", 75)
    assert f"to go on: esper resume {run}" in first.err.splitlines()[-1]
    assert "Traceback" not in first.told()
    stopped = status["step"]
    assert 50 <= stopped < 120
    assert saved(run, stopped)()
    assert_gone(first, run)

    killed = start(ESPER, "resume", "run")
    killed.until(saved(run, 144), "the checkpoint of step 144")
    workers = [killed.worker(run, rank) for rank in (0, 1)]
    assert set(workers) <= killed.seen
    killed.process.kill()
    killed.process.wait()
    assert_gone(killed, run)
    assert "Traceback" not in killed.told()
    assert not (run / "result.json").exists()

    last = start(ESPER, "resume", "run")
    assert last.end() == 0, last.told()
    assert f"esper: done at step {12 * TICKS} (run directory: {run})" in last.out
    assert_gone(last, run)
    assert_same_run(without_saves(final(run)), without_saves(wanted))
    (*begun, (number, step)) = attempts(run)
    assert (*begun, number) == ((1, None), (2, stopped), 3)
    assert step is not None
    assert step >= 144

    files = offline_files(run)
    assert len({path.parent for path in files}) == len(files) == 3
    seen, records = {}, {r["tick"]: r for r in keep_latest(read_events(run / "events.jsonl")) if r["kind"] == "tick"}
    assert set(records) == set(range(1, TICKS + 1))
    for path, since in zip(files, (0, stopped, step), strict=True):
        file = read_wandb_file(path)
        assert file.run["id"] == json.loads((run / "attempt.json").read_text())["run_id"]
        rows = [row for row in file.history if "lr" in row]
        assert [row["tick"] for row in rows] == list(range(since // 12 + 1, since // 12 + 1 + len(rows)))
        seen |= {row["tick"]: row for row in rows}
    assert (file.ended, file.exit_code) == (True, 0)
    assert rows[-1]["tick"] == TICKS
    for tick, row in seen.items():
        assert (row["train/step"], row["train/loss"]) == (12 * tick, records[tick]["payload"]["train_loss"]["value"])


# The folder: tests/launcher/test_launcher.py; its ranks, to the bit: tests/dist/test_changed_settings.py
@pytest.mark.slow
def test_undo_goes_on_from_an_older_checkpoint_in_a_new_folder(
    grown: Finished, start: Start, tmp_path: Path, wanted: dict[str, Any]
) -> None:
    def contents() -> dict[Path, tuple[int, bytes]]:
        files = [path for path in grown.run.rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = contents()
    command = start(ESPER, "resume", str(grown.run), "--at", "192", "--as", "again")
    assert command.end() == 0, command.told()
    assert contents() == before
    run = tmp_path / "again"
    assert attempts(run) == [(1, 192)]
    found = final(run)
    later = [event for event in wanted["plain"]["events"] if event[1] > 192]
    assert_same_run(found, {**wanted, "plain": {**wanted["plain"], "events": later}})
    assert "resumed from step 192" in command.out
