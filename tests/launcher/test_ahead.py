"""The process that is started ahead checks settings and becomes the agent; the launcher itself goes without torch."""

import json
import os
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from esper.config.tree import EsperConfig, build_config
from esper.launcher.ahead.process import Ahead, is_plain_run
from esper.leyline.errors import ConfigError
from esper.tolaria.ranks.config import WorldConfig
from tests.support.commands import environment
from tests.support.tiny import tiny_plain
from tests.support.toy_tasks import toy_plain

LATE = ("torch", "numpy", "scipy", "sklearn", "wandb", "matplotlib", "rich", "pyarrow", "esper.config.rules")
BAD = {"optim__lr": -1.0, "trainer__batch": 1, "slots__ids": ["r9c9"]}
SCRIPT = """
import json, os, sys
from esper.launcher.ahead.process import Ahead
ahead = Ahead()
ahead.start()
from esper.launcher import compose, start
from esper.launcher.processes import children_of
from esper.launcher.supervise import Ended
from esper.leyline.errors import ConfigError

told = {}
try:
    ahead.check(json.loads(sys.argv[1]))
except ConfigError as error:
    told["problems"] = list(error.problems)
told["verdicts"] = [ahead.try_parts(json.loads(text), {"TRIED": "1"}) for text in sys.argv[2:]]

def in_place_of_a_run(command, environment, *, ready, lock, **others):
    told.update(ready=ready is not None, modules=sorted(sys.modules), run=os.listdir("run"))
    (server,) = children_of(ready.process.pid)
    ready.process.kill()
    ready.process.wait()
    return Ended(1, None, False)

start.supervise = in_place_of_a_run
told["code"] = compose.main(["experiment=demo", "run.dir=run"], ahead=ahead)
early = Ahead()
early.start() if "torch" not in sys.modules else None
process = early.process
early.dismiss()
told["dismissed"] = process.returncode
print(json.dumps(told))
"""


def test_the_launcher_composes_and_has_all_checked_without_torch(tmp_path: Path) -> None:
    bad, fits = tiny_plain("cnn", **BAD), toy_plain("segmentation")
    misfit = {**fits, "task": toy_plain("multilabel")["task"]}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(json.dumps, (bad, misfit, fits))],
        cwd=tmp_path,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    with pytest.raises(ConfigError) as here:
        build_config(bad)
    assert told["problems"] == list(here.value.problems), "as many, and in the same words, as where torch is loaded"
    assert len(told["problems"]) == len(BAD)
    wrong, right = told["verdicts"]
    assert (wrong["code"], right) == (78, {"code": 0, "lines": []})
    assert "do host and data fit it" in wrong["lines"][0]
    assert told["ready"]
    assert [name for name in LATE if name in told["modules"]] == []
    assert sorted(told["run"]) == ["config.yaml", "environment.json", "lock"]
    assert told["code"] == 70, "its workers ended without a word"
    assert told["dismissed"] == -9


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> tuple[Ahead, socket.socket]:
    """An `Ahead` whose process is none of ours, and the other end of its line."""
    ours, theirs = socket.socketpair()
    ahead = Ahead()
    ahead.process = subprocess.Popen(["sleep", "600"])
    monkeypatch.setattr(ahead, "_line", Connection(ours.detach()))
    monkeypatch.setattr(ahead, "_began", (os.getcwd(), {"OMP_NUM_THREADS": "1"}), raising=False)
    return ahead, theirs


def test_a_process_that_has_ended_is_done_without(stand_in: tuple[Ahead, socket.socket]) -> None:
    ahead, theirs = stand_in
    theirs.close()
    assert isinstance(ahead.check(tiny_plain("cnn")), EsperConfig)
    assert ahead.process is None
    assert ahead.take({}) is None


def test_what_it_finds_wrong_is_the_launchers_own_error(stand_in: tuple[Ahead, socket.socket]) -> None:
    ahead, theirs = stand_in
    line = Connection(theirs.detach())
    line.send_bytes(json.dumps({"problems": ["seed = -1: must be >= 0"]}).encode())
    with pytest.raises(ConfigError, match=r"^seed = -1: must be >= 0$"):
        ahead.check(tiny_plain("cnn"))
    line.close()
    ahead.dismiss()


@pytest.mark.parametrize(
    ("threads", "folder", "taken"), [("1", ".", True), ("2", ".", False), ("1", "elsewhere", False)]
)
def test_it_is_taken_only_as_what_the_run_needs(
    stand_in: tuple[Ahead, socket.socket],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    threads: str,
    folder: str,
    taken: bool,
) -> None:
    ahead, process = stand_in[0], stand_in[0].process
    assert process is not None
    if folder != ".":
        monkeypatch.chdir(tmp_path)
    ready = ahead.take({"OMP_NUM_THREADS": threads})
    assert (ready is not None) == taken
    assert ahead.process is None
    if not taken:
        assert process.returncode == -9, "what does not fit is ended"
    process.kill()
    process.wait()


def test_what_needs_no_agent_starts_none() -> None:
    assert is_plain_run(["experiment=demo", "launch=run"])
    for words in (["--help"], ["-m", "seed=1,2"], ["launch=plan"], ["experiment=demo", "launch=prepare"]):
        assert not is_plain_run(words)
    ahead = Ahead()
    ahead.start()
    assert ahead.process is None, "this process has torch, and checks by itself"
    assert WorldConfig().threads == 1
