"""A run directory of somebody else names code: resume, export, a teacher and torchrun by hand ask first."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from esper import cli
from esper.config.digest import config_digest
from esper.config.tree import build_config, load_config, read_plain, write_config
from esper.config.trust import TRUST, named_code
from esper.launcher import compose as launcher
from esper.launcher.start import start
from esper.leyline.files import RunDir
from tests.support.commands import environment
from tests.support.dist import ROOT
from tests.support.foreign import STRANGER, Trap, give_away, lay_trap, needs_root
from tests.support.tiny import custom_host, make_engine, tiny_plain

SETTINGS = {
    "host": custom_host("trap_code:build", {"r0c0": "0"}),
    "world__nproc_per_node": 1,
    "trainer__steps": 8,
    "control__every": 2,
    "checkpoint__every_ticks": 1,
}
NAMES = r"and it names code that would be imported and run here: host\.path = 'trap_code:build'; if you trust it, "


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.delenv(TRUST, raising=False)
    yield lay_trap(tmp_path)
    sys.modules.pop("trap_code", None)


@pytest.fixture
def run(trap: Trap) -> Path:
    """One's own run with a checkpoint, and code that has not been imported since."""
    folder = trap.folder / "run"
    folder.mkdir()
    write_config(folder / "config.yaml", tiny_plain("cnn", **SETTINGS))
    engine = make_engine(build_config(read_plain(folder / "config.yaml")), folder)
    engine.begin(None)
    engine.run()
    assert trap.sprung()[0] == "imported"
    del sys.modules["trap_code"]
    return folder


def refused(act: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command is refused."""
    assert act() == 78
    (line,) = capsys.readouterr().err.splitlines()
    return line


@needs_root
def test_resume_and_export_ask_before_they_import(trap: Trap, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    give_away(run / "config.yaml")
    whose = rf"{run}/config\.yaml: belongs to user {STRANGER}, not to you \(.*\), {NAMES}"
    export = ["export", str(run), "--to", str(trap.folder / "plain")]
    line = refused(lambda: cli.main(export), capsys)
    assert re.search(whose + rf"type esper export {run} --trust$", line), line
    for words in (["resume", str(run)], ["resume", str(run), "--at", "2", "--as", str(trap.folder / "new")]):
        line = refused(lambda words=words: cli.main(words), capsys)
        assert re.search(whose + rf"type esper resume {run} --trust$", line), line
    assert trap.sprung() == []
    assert "trap_code" not in sys.modules
    assert not (trap.folder / "new").exists()
    assert not (trap.folder / "plain").exists()
    assert cli.main([*export, "--trust"]) == 0
    assert trap.sprung() == ["imported", "called"]


@needs_root
def test_a_trusted_run_is_resumed_by_its_ranks_too(trap: Trap, run: Path) -> None:
    give_away(run / "config.yaml")
    assert cli.main(["resume", str(run), "--trust"]) == 0
    assert json.loads(RunDir(run).status.read_text())["status"] == "done"
    assert trap.sprung()[:2] == ["imported", "imported"], "by the launcher, by the rank"


@needs_root
def test_a_worker_that_is_typed_by_hand_asks_too(trap: Trap, run: Path) -> None:
    give_away(run / "config.yaml")
    words = [sys.executable, "-m", "esper.worker", str(run / "config.yaml")]
    around = environment(trap.folder) | {"PYTHONPATH": os.environ["PYTHONPATH"]}
    done = subprocess.run(words, env=around, capture_output=True, text=True)
    digest = config_digest(read_plain(run / "config.yaml"))
    assert re.search(NAMES + f"put {TRUST}={digest} before the command", done.stderr), done.stderr
    assert trap.sprung() == []


@needs_root
def test_a_teachers_run_is_asked_about_before_anything_starts(
    trap: Trap, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    give_away(run / "config.yaml")
    words = ["run.dir=student", f"distill.run={run}", "launch=plan"]
    line = refused(lambda: launcher.main(words), capsys)
    assert re.search(rf"belongs to user {STRANGER}, .*{NAMES}set distill\.trust=true$", line), line
    assert trap.sprung() == []
    assert launcher.main([*words, "distill.trust=true"]) == 0


def test_ones_own_run_needs_no_word_under_any_usual_umask(trap: Trap, run: Path) -> None:
    assert cli.main(["export", str(run)]) == 0
    for mask in (0, 0o002, 0o022, 0o077):
        before = os.umask(mask)
        try:
            plain = tiny_plain("cnn", **SETTINGS, run__dir=str(trap.folder / f"deep-{mask}" / "run"))
            start(build_config(plain), plain, "prepare")
            if not mask:
                start(build_config(plain), plain, "prepare")  # as a requeued job does
        finally:
            os.umask(before)
        config = trap.folder / f"deep-{mask}" / "run" / "config.yaml"
        assert config.stat().st_mode & 0o222 == 0
        assert config.parent.stat().st_mode & 0o002 == 0
        load_config(config)


def test_what_names_code_is_known() -> None:
    assert named_code(tiny_plain("cnn")) == {}
    assert named_code(tiny_plain("cnn", distill__run="/there")) == {}
    assert named_code(tiny_plain("cnn", distill__run="/there", distill__trust=True)) == {"distill.run": "/there"}
    assert named_code(tiny_plain("cnn", distill__path="a:b", controller={"kind": "custom", "path": "c:d"})) == {
        "distill.path": "a:b",
        "controller.path": "c:d",
    }
