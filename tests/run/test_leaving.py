"""A rank ends with the code of its run, whatever happens while libraries are taken down."""

import json
import subprocess
import sys
from pathlib import Path

from esper.config.tree import write_config
from esper.leyline.files import RunDir
from tests.support.commands import environment
from tests.support.dist import ROOT
from tests.support.tiny import custom_host, tiny_plain

BOMB = """
import atexit, os, threading

class Bomb:
    def __del__(self):
        os.abort()

bomb = Bomb()  # freed with its module, as the interpreter is taken down
atexit.register(print, "said at exit", flush=True)

def build(**_):
    from torch import nn
    threading.Thread(target=lambda: (threading.main_thread().join(), os.write(1, b"said by a thread\\n"))).start()
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    around = environment(folder) | {"PYTHONPATH": f"{folder}:{ROOT}"}
    return subprocess.run([sys.executable, *words], env=around, capture_output=True, text=True)


def test_a_run_that_is_done_ends_so_though_the_teardown_aborts(tmp_path: Path) -> None:
    (tmp_path / "bomb.py").write_text(BOMB)
    host = custom_host("bomb:build", {"r0c0": "0"})
    plain = tiny_plain("cnn", host=host, world__nproc_per_node=1, trainer__steps=4, control__every=2)
    write_config(tmp_path / "config.yaml", plain)
    done = run(tmp_path, "-m", "esper.worker", str(tmp_path / "config.yaml"))
    assert done.returncode == 0, done.stderr
    assert json.loads(RunDir(tmp_path).status.read_text())["status"] == "done"
    assert done.stdout.splitlines()[-2:] == ["said by a thread", "said at exit"]


def test_the_code_is_the_runs_and_without_one_nothing_changes(tmp_path: Path) -> None:
    begin = "from esper.run.leaving import leave_with\nimport bomb, sys\n"
    (tmp_path / "bomb.py").write_text(BOMB)
    ended = run(tmp_path, "-c", begin + "print('said first')\nleave_with(75)\nsys.exit(75)")
    assert (ended.returncode, ended.stdout) == (75, "said first\nsaid at exit\n")
    assert run(tmp_path, "-c", begin).returncode == -6, "the bomb goes off in Python's own teardown"
