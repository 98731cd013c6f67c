"""A stop while the ranks start or compile: they are ended at once exactly if no step would be lost by it."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from esper.launcher.unsaved import NothingUnsaved
from esper.leyline.files import RunDir
from tests.launcher.test_launcher import Supervised
from tests.support.commands import alive


def mark(run: Path, *ranks: tuple[int, str], error: str = "") -> None:
    """Marks as `Heartbeat` writes them: each rank's step and phase."""
    RunDir(run).heartbeat.mkdir(parents=True, exist_ok=True)
    for rank, (step, phase) in enumerate(ranks):
        line = json.dumps([step, step // 2, phase, [0.0, "", 0.0], error])
        (RunDir(run).heartbeat / f"rank-{rank:05d}").write_text(line.ljust(512))


@pytest.mark.parametrize(
    ("marks", "saved", "more", "nothing"),
    [
        ([(0, "start"), (0, "start")], None, {}, True),
        ([(0, "forward"), (0, "start")], None, {}, True),
        ([(8, "forward"), (8, "backward")], 8, {}, True),
        ([(6, "forward"), (8, "forward")], 8, {}, True),
        ([(8, "forward"), (9, "forward")], 8, {}, False),
        ([(1, "forward"), (1, "forward")], None, {}, False),
        ([(8, "save"), (8, "forward")], 8, {}, False),
        ([(8, "test"), (8, "test")], 8, {}, False),
        ([(8, "forward"), (8, "forward")], 8, {"error": "lost contact"}, False),
        ([], 8, {}, False),
    ],
)
def test_only_steps_that_are_saved_and_phases_that_last_count(
    tmp_path: Path, marks: list[tuple[int, str]], saved: int | None, more: dict[str, Any], nothing: bool
) -> None:
    mark(tmp_path, *marks, **more)
    if saved is not None:
        (RunDir(tmp_path).checkpoints / f"step-{saved:08d}").mkdir(parents=True)
    asked = NothingUnsaved(tmp_path, still_s=0.0)
    asked()
    assert asked() is nothing


def test_a_rank_that_gets_on_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    asked = NothingUnsaved(tmp_path, still_s=10.0)
    mark(tmp_path, (0, "start"))
    said = []
    for seconds, phase in ((0, "start"), (9, "start"), (9, "forward"), (9, "forward"), (1, "forward")):
        now[0] += seconds
        mark(tmp_path, (0, phase))
        said.append(asked())
    assert said == [False, False, False, False, True]


def test_what_cannot_be_read_is_unsaved(tmp_path: Path) -> None:
    mark(tmp_path, (0, "start"))
    (RunDir(tmp_path).heartbeat / "rank-00000").write_text("torn")
    asked = NothingUnsaved(tmp_path, still_s=0.0)
    asked()
    assert asked() is False


def test_a_stop_ends_ranks_that_do_not_answer_and_have_nothing_to_save(tmp_path: Path) -> None:
    launched = Supervised(tmp_path, "stubborn", ranks=1, grace_s=600)
    try:
        launched.until_ranks_work()
        workers = launched.workers()
        mark(tmp_path / "run", (0, "forward"))
        launched.process.send_signal(signal.SIGTERM)
        assert launched.end() == 0, launched.told()
        assert "no step is unsaved, so they are ended at once" in launched.err
        assert "stopped='SIGTERM', forced=True" in launched.out, launched.told()
        assert not [pid for pid in workers if alive(pid)]
    finally:
        launched.clear()
