"""The seconds of a start: from the command to the first step, and of the rank alone where it is repeated."""

import json
import time
from pathlib import Path

import pytest

from esper.run.environment import SET_UP, STARTED, Phases, process_began, write_start


def test_each_phase_lasts_from_the_one_before() -> None:
    phases = Phases(10.0)
    for name, end in (("check", 14.5), ("compose", 11.0), ("agent", 15.0)):
        phases.end(name, lambda end=end: end)
    assert phases.seconds() == {"compose": 1.0, "check": 3.5, "agent": 0.5}
    phases.end("check", lambda: 14.75)
    assert phases.seconds()["check"] == 3.75, "checked once more, as a resume does"


def test_a_rank_goes_on_from_the_launcher_but_for_a_start_that_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = Phases(0.0)
    launcher.end("compose", lambda: 2.0)
    monkeypatch.setenv(STARTED, launcher.to_text())
    assert Phases.of_rank().seconds() == {"compose": 2.0}
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Phases.of_rank().seconds() == {}
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    elsewhere = {**json.loads(launcher.to_text()), "host": "another"}
    monkeypatch.setenv(STARTED, json.dumps(elsewhere))
    assert Phases.of_rank().seconds() == {}, "the clock of another machine says nothing here"


def test_a_process_knows_when_it_began() -> None:
    assert 0 <= time.clock_gettime(time.CLOCK_BOOTTIME) - process_began() < 24 * 3600


def test_they_are_added_to_what_the_launcher_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_start(tmp_path, {"step": 1.0})
    assert list(tmp_path.iterdir()) == [], "a folder made by hand has no such file"
    path = tmp_path / "environment.json"
    path.write_text('{"host": "a"}')
    write_start(tmp_path, {"step": 1.0})
    assert json.loads(path.read_text()) == {"host": "a", "start": {"step": 1.0}}
    path.write_text("{")
    write_start(tmp_path, {"step": 1.0})
    assert "environment.json: the seconds of this start are not in it" in capsys.readouterr().err


def test_a_start_counts_from_the_end_of_a_set_up_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    began = process_began()
    monkeypatch.setenv(SET_UP, str(began + 300.0))
    assert process_began() == began + 300.0
    monkeypatch.setenv(SET_UP, str(began - 300.0))
    assert process_began() == began, "a shell above the one that became this process"
