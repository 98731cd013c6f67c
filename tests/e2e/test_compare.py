"""`esper compare` as typed: it detects an effect that was planted, reports none where there is none, and reproduces."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from esper import cli
from esper.config.tree import read_plain
from tests.support.dist import ROOT
from tests.support.killed_runs import live, prepare_run
from tests.support.patience import run_patiently

SLOT = [
    "{tick: 1, slot: r0c0, op: GERMINATE, blueprint: %s, ticks: 1}",
    "{tick: 3, slot: r0c0, op: ADVANCE}",
    "{tick: 4, slot: r0c0, op: ADVANCE}",
    "{tick: 6, slot: r0c0, op: ADVANCE}",
    "{tick: 7, slot: r0c0, op: FOSSILIZE}",
]

TEXT = """
base:
  - host=custom
  - host.path=tests.support.histogram_host:build
  - 'host.sites={r0c0: lift}'
  - data=digits
  - world.nproc_per_node=1
  - trainer.steps=160
  - control.every=10
  - optim.lr=0.02
  - checkpoint.keep=1
  - gates=observe
  - slots.incubation=immediate
  - telemetry.wandb.mode=disabled
seeds: [1, 2]
metric: accuracy
subject: shapes
flops_share: 0.75
margin: 0.01
arms:
  none: {overrides: [controller=none]}
  nothing: {overrides: [controller=schedule, 'controller.actions=[NOOP]']}
  shapes: {overrides: [controller=schedule, 'controller.actions=[CONV]']}
  final: {topology: shapes, overrides: [controller=none]}
  none_long: {flops: nothing, overrides: [controller=none]}
"""


def esper(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return run_patiently([sys.executable, "-m", "esper.cli", *arguments], cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    life = [line for line in SLOT if "tick: 4" not in line]  # immediate: no TRAINING to advance from
    text = TEXT.replace("NOOP", ", ".join(life) % "noop").replace("CONV", ", ".join(life) % "conv_heavy")
    (folder / "planted.yaml").write_text(text)
    done = esper("compare", "planted.yaml", "--out", "out", cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done


def results(folder: Path) -> dict:
    where = json.loads((folder / "out" / "compare.json").read_text())["runs"]
    return {key: json.loads((Path(run) / "result.json").read_text()) for key, run in where.items()}


def test_an_effect_that_was_planted_is_detected(compared):
    folder, done = compared
    found = results(folder)
    gains = [
        found[f"shapes/{s}"]["test_accuracy"]["value"] - found[f"none/{s}"]["test_accuracy"]["value"] for s in (1, 2)
    ]
    assert min(gains) > 0.2, gains
    said = done.stdout.splitlines()
    words = {line.split("beats none")[0].split()[-1]: line.split()[0] for line in said if " beats none " in line}
    assert words in ({"shapes": word, "final": other} for word in ("yes", "open") for other in ("yes", "open")), said
    assert all(re.search(rf"{arm} beats none +\+\d\d\.\d\d points", done.stdout) for arm in words), done.stdout


def test_where_nothing_was_planted_nothing_is_reported(compared):
    folder, _ = compared
    found = results(folder)
    for seed in (1, 2):
        nothing, none = found[f"nothing/{seed}"], found[f"none/{seed}"]
        assert nothing["topology"]["r0c0"]["blueprint"] == "noop"
        assert nothing["test_accuracy"]["value"] == none["test_accuracy"]["value"]
        assert nothing["validation_loss"]["value"] == none["validation_loss"]["value"]


def test_an_arm_that_is_derived_has_the_topology_of_the_other(compared):
    folder, _ = compared
    found = results(folder)
    for seed in (1, 2):
        assert found[f"final/{seed}"]["topology"].keys() == found[f"shapes/{seed}"]["topology"].keys()
        assert found[f"final/{seed}"]["parameters"] == found[f"shapes/{seed}"]["parameters"]


def test_an_arm_of_equal_flops_spent_what_the_other_did_to_half_a_step(compared):
    folder, _ = compared
    found = results(folder)
    for seed in (1, 2):
        none, long = found[f"none/{seed}"], found[f"none_long/{seed}"]
        step = 64 * none["flops"] / none["samples"]
        assert long["samples"] > none["samples"]
        assert long["samples"] % 64 != 0  # short batches end its epochs
        assert abs(long["flops"] - found[f"nothing/{seed}"]["flops"]) <= step / 2


def test_again_it_repeats_nothing_and_says_the_same(compared, monkeypatch, capsys):
    folder, done = compared
    where = json.loads((folder / "out" / "compare.json").read_text())["runs"]
    times = {run: (Path(run) / "result.json").stat().st_mtime_ns for run in where.values()}
    monkeypatch.chdir(folder)
    assert cli.main(["compare", "planted.yaml", "--out", "out", "--report"]) == 0
    again = capsys.readouterr().out
    assert {run: (Path(run) / "result.json").stat().st_mtime_ns for run in where.values()} == times

    def table(text: str) -> list[str]:
        lines = text.splitlines()
        return lines[next(i for i, line in enumerate(lines) if line.startswith("planted.yaml:")) :][:-1]

    assert table(again) == table(done.stdout)
    assert (folder / "out" / "compare.html").read_text().count("<svg") == 3


def test_a_run_reproduces_from_its_recorded_config(compared):
    folder, _ = compared
    where = json.loads((folder / "out" / "compare.json").read_text())["runs"]
    again = prepare_run(folder / "again", read_plain(Path(where["shapes/1"]) / "config.yaml"))
    assert live(again, 1) == [0]
    first, second = (json.loads((run / "result.json").read_text()) for run in (Path(where["shapes/1"]), again))
    assert {k: v for k, v in first.items() if k != "data"} == {k: v for k, v in second.items() if k != "data"}


def test_a_run_is_not_resumed_on_other_data(compared):
    folder, _ = compared
    where = json.loads((folder / "out" / "compare.json").read_text())["runs"]
    other = prepare_run(folder / "other", read_plain(Path(where["none/1"]) / "config.yaml"))
    shutil.copytree(Path(where["none/1"]) / "checkpoints", other / "checkpoints")
    record = json.loads((Path(where["none/1"]) / "data.json").read_text())
    (other / "data.json").write_text(json.dumps({**record, "digest": record["digest"] + 1}))
    assert live(other, 1) == [74]
    status = json.loads((other / "STATUS.json").read_text())
    assert status["exit_code"] == 74
    assert "this run trains on other data" in status["message"]
    assert not (other / "result.json").exists()


def test_a_bad_comparison_is_one_clear_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "nothing"]) == 78
    assert "no such comparison; there are" in capsys.readouterr().err
    (tmp_path / "x.yaml").write_text(
        "base: []\nseeds: [1]\nmetric: accuracy\nsubject: a\nflops_share: 1\nmargin: 1\narms: {a: {flops: b}}\n"
    )
    assert cli.main(["compare", "x.yaml"]) == 78
    assert "arms.a: waits for b, which is no arm" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [tmp_path / "x.yaml"]
