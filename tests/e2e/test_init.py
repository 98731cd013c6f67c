"""A starting template trains at once, grows, and passes its own test; and its run is evaluated and exported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from esper.leyline.errors import ConfigError
from esper.run.using.starting import write_project
from esper.run.using.templates import MODEL
from tests.support.dist import ROOT

# Two commands, in a process that has loaded torch once.
USED = """
from esper import cli
words = ["eval", "run", "--json", "numbers.json", "--part", "validation"]
raise SystemExit(cli.main(words) or cli.main(["export", "run"]))
"""


def typed(folder: Path, *words: str) -> str:
    env = {"PYTHONPATH": f"{folder}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "task", ["segmentation", *(pytest.param(t, marks=pytest.mark.slow) for t in MODEL if t != "segmentation")]
)
def test_a_template_passes_its_own_test_and_its_run_can_be_used(task: str, tmp_path: Path) -> None:
    folder = tmp_path / "shapes"
    write_project(folder, task)
    settings = [line for line in (folder / "settings.txt").read_text().splitlines() if not line.startswith("#")]
    quick = ["trainer.steps=24", "trainer.limit=24", "control.every=6", "run.dir=run", "telemetry.wandb.mode=disabled"]
    out = typed(folder, "-m", "esper.cli", "train", *settings, *quick)
    own = {"segmentation": "object_iou", "regression": "mae", "classification": "accuracy"}[task]
    assert f"validation {own}" in out
    assert "accuracy" not in out or task == "classification"
    result = json.loads((folder / "run" / "result.json").read_text())
    assert result["step"] == 24
    assert result["task"]["objective"] == f"validation_{own}"
    assert "a plain model" in typed(folder, "-c", USED)
    found = json.loads((folder / "numbers.json").read_text())
    assert found["samples"] == 120
    if task != "segmentation":
        typed(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider")


def test_wrong_words_are_one_line(tmp_path: Path) -> None:
    for name, task, text in (("my-lab", "regression", "cannot be called so"), ("lab", "poetry", "no template for it")):
        with pytest.raises(ConfigError, match=text):
            write_project(tmp_path / name, task)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match="it is there already"):
        write_project(tmp_path / "there", "regression")
