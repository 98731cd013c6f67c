"""What ``esper resume RUN trainer.steps=...`` takes and refuses, and how RUN stands if it is killed in between."""

import json
from pathlib import Path

import pytest

from esper import cli
from esper.config.tree import build_config, load_config
from esper.launcher import compose, resume, start
from esper.leyline.files import RunDir, write_json
from esper.run import extension
from esper.run.directory import hold_run, read_status

RESULT = {"step": 50, "objective": 0.5}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 50 steps that is done, in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ESPER_DATA", raising=False)
    assert compose.main(["launch=prepare", "run.dir=run", "trainer.steps=50", "optim.schedule=cosine"]) == 0
    files = RunDir(tmp_path / "run")
    write_json(files.status, {"status": "done", "step": 50, "objective": 0.5, "message": "", "exit_code": 0})
    write_json(files.result, RESULT)
    return tmp_path / "run"


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file() and path.name != "lock"}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("trainer.steps=40", "trainer.steps = 40: the run has 50 and can only become longer; set trainer.steps=<more"),
        ("trainer.steps=null", "trainer.steps = None: the run has 50 and can only become longer"),
        ("trainer.epochs=900", "trainer.epochs = 900: the run's length is trainer.steps = 50; set trainer.steps=<more"),
        ("trainer.steps=0", "trainer.steps = 0: must be >= 1"),
        ("governor.errors=5", "is done, so nothing would run with governor.errors=5; to make it longer, add trainer"),
    ],
)
def test_a_run_only_becomes_longer(run: Path, capsys: pytest.CaptureFixture[str], change: str, line: str) -> None:
    before = contents(run)
    capsys.readouterr()
    assert cli.main(["resume", "run", change]) == 78
    error = capsys.readouterr().err
    assert line in error
    assert len(error.splitlines()) == 1
    assert contents(run) == before
    assert cli.main(["resume", "run", change, "--at", "50", "--as", "new"]) != 0
    assert not Path("new").exists()


def test_the_same_length_again_changes_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As after a requeue that came when all was done."""
    assert cli.main(["resume", "run", "trainer.steps=50"]) == 0
    assert "esper: done at step 50" in capsys.readouterr().out
    assert json.loads((run / "result.json").read_text()) == RESULT


def test_a_command_that_begins_runs_makes_none_longer(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run.dir=run", "optim.schedule=cosine", "trainer.steps=90"]
    assert compose.main(words) == 78
    assert f"trainer.steps = 90: the run has 50; set trainer.steps=50; to make it longer: esper resume {run}" in (
        capsys.readouterr().err
    )
    assert compose.main([*words, "run.resume=must", "launch=prepare"]) == 0
    assert "trainer.steps = 90, it was 50; its result is kept as result-00000050.json" in capsys.readouterr().out
    assert load_config(run / "config.yaml")[0].trainer.steps == 90


def test_the_result_is_kept_and_the_schedule_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, plain = load_config(run / "config.yaml")
    resume.change_settings(plain, ["trainer.steps=90"])
    plain["run"]["resume"] = "must"
    config, _ = build_config(plain), capsys.readouterr()
    assert start.start(config, plain, "prepare").code == 0
    out = capsys.readouterr().out
    assert "made longer: trainer.steps = 90, it was 50; its result is kept as result-00000050.json; optim.sched" in out
    assert "the learning rate is that of the longer run, higher than it was" in out
    assert json.loads((run / "result-00000050.json").read_text()) == RESULT
    assert not (run / "result.json").exists()
    status, _ = read_status(run)
    assert status is not None
    assert (status["status"], status["step"], status["objective"]) == ("preempted", 50, None)
    assert start.start(config, plain, "prepare").code == 0
    assert "made longer" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "ended"), [("write_json", "done"), ("sync", "preempted")])
def test_killed_in_between_it_is_as_long_as_it_was(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str, ended: str
) -> None:
    """The new length is written last. Whatever was done before it, the same command goes on."""

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    _, plain = load_config(run / "config.yaml")
    resume.change_settings(plain, ["trainer.steps=90"])
    plain["run"]["resume"] = "must"
    config = build_config(plain)
    with monkeypatch.context() as patch:
        patch.setattr(extension, name, killed)
        with pytest.raises(Killed), hold_run(config.run, plain):
            pass
    assert load_config(run / "config.yaml")[0].trainer.steps == 50
    status, _ = read_status(run)
    assert status is not None
    assert status["status"] == ended, "a resume of what is not done writes its result anew"
    with hold_run(config.run, plain):
        assert load_config(run / "config.yaml")[0].trainer.steps == 90
    assert json.loads((run / "result-00000050.json").read_text()) == RESULT
    assert not (run / "result.json").exists()
