"""Jobs that people have, from the command line: trained, grown, stopped, resumed, evaluated, exported, compared."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from esper import cli
from esper.nissa.reading import keep_latest, read_events
from esper.tolaria.checkpoint.snapshot import read_common
from esper.tolaria.checkpoint.store import CheckpointStore
from tests.support.commands import ESPER, TRAIN, Command, assert_gone, mark
from tests.support.dist import ROOT
from tests.support.jobs import JOBS, growing, host, words_of, write_diabetes

ARMS = """
seeds: [1]
metric: {metric}
subject: grown
flops_share: 0.75
margin: 0.01
arms:
  none: {{overrides: [controller=none]}}
  grown: {{overrides: {grown}}}
"""


def played(folder: Path, name: str) -> dict[str, Any]:
    """Trains a job, stops it on its way, goes on, and uses what came of it."""
    job = JOBS[name]
    words = (*words_of(job), *growing(job.blueprint))
    found: dict[str, Any] = {"run": folder / "run"}
    train = Command(TRAIN, *words, "run.dir=run", folder=folder)
    try:
        train.until(lambda: mark(folder / "run").tick >= 5, "tick 5")
        with train.held(folder / "run"):
            train.process.send_signal(signal.SIGTERM)
        assert train.end() == 75, train.told()
    finally:
        train.clear()
    resume = Command(ESPER, "resume", "run", folder=folder)
    try:
        assert resume.end() == 0, resume.told()
    finally:
        resume.clear()
    return {**found, "out": resume.out, "result": json.loads((folder / "run" / "result.json").read_text())}


@pytest.fixture(scope="module", params=[n if n == "digits" else pytest.param(n, marks=pytest.mark.slow) for n in JOBS])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    name = str(request.param)
    folder = tmp_path_factory.mktemp(name)
    if name == "diabetes":
        write_diabetes(folder / "diabetes.csv")
    return {"name": name, "folder": folder, **played(folder, name)}


def test_it_learns_grows_and_goes_on_after_a_stop(job: dict[str, Any]) -> None:
    kind, result, run = JOBS[job["name"]], job["result"], job["run"]
    assert result["topology"]["r0c0"]["stage"] == "FOSSILIZED"
    assert result["step"] == 72
    records = read_events(run / "events.jsonl")
    assert [r["attempt"] for r in records if r["kind"] == "run_started"] == [1, 2]
    losses = [r["payload"]["validation_loss"]["value"] for r in records if r["kind"] == "tick"]
    assert losses[-1] < 0.8 * losses[0], "it learns"
    assert f"validation {kind.metric}" in job["out"]
    assert kind.accurate or "accuracy" not in job["out"]


def test_its_network_is_evaluated_exported_and_reported(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(job["folder"])
    assert cli.main(["eval", "run", "--json", "numbers.json"]) == 0
    numbers = json.loads((job["folder"] / "numbers.json").read_text())
    assert numbers["metrics"] == pytest.approx(job["result"]["test_metrics"])
    assert numbers["loss"]["value"] == pytest.approx(job["result"]["test_loss"]["value"])
    assert cli.main(["export", "run"]) == 0
    assert cli.main(["report", "run"]) == 0
    assert "a plain model" in capsys.readouterr().out
    page = (job["run"] / "report.html").read_text().lower()
    kind = JOBS[job["name"]]
    assert kind.metric in page
    assert kind.accurate or "accuracy" not in page


@pytest.mark.slow
def test_it_is_compared_by_its_own_metric(
    job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind, folder = JOBS[job["name"]], job["folder"]
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    base = yaml.safe_dump({"base": list(words_of(kind))})
    arms = ARMS.format(metric=kind.metric, grown=json.dumps(list(growing(kind.blueprint))))
    (folder / "arms.yaml").write_text(base + arms)
    assert cli.main(["compare", "arms.yaml", "--out", "out"]) in (0, 70)
    said = capsys.readouterr().out
    assert kind.head in " ".join(said.split()), said
    assert kind.accurate or "accuracy" not in said


def finish(command: Command) -> None:
    try:
        assert command.end() == 0, command.told()
    finally:
        command.clear()


def outcome(run: Path) -> tuple[int, dict[str, torch.Tensor], list[Any]]:
    """The digest of all numbers of samples that were trained on, all weights, and the course of the losses."""
    step = max(CheckpointStore.of_run(run).steps())
    payload, _ = read_common(CheckpointStore.of_run(run), step)
    weights = payload["model"]
    records = keep_latest(read_events(run / "events.jsonl"))
    ticks = [(r["step"], r["payload"]["train_loss"]["value"]) for r in records if r["kind"] == "tick"]
    return int(next(v for name, v in weights.items() if name.endswith("seen"))), weights, ticks


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_other_workers_over_the_same_samples(tmp_path: Path) -> None:
    """Killed with two workers, again with none, and ended with three: what an undisturbed run with one comes to."""
    words = [word for word in words_of(JOBS["shapes"]) if not word.startswith(("host.", "data.path"))]
    words += ["data.path=tests.support.jobs:shapes", "data.options={numbered: true}", *host("numbered", "inner.0")]
    words += growing("conv_light")
    whole = Command(TRAIN, *words, "run.dir=whole", "data.workers=1", folder=tmp_path)
    finish(whole)
    run = tmp_path / "run"
    began = Command(TRAIN, *words, "run.dir=run", "data.workers=2", folder=tmp_path)
    killed(began, run, 5)
    killed(Command(ESPER, "resume", "run", "data.workers=0", folder=tmp_path), run, 8)
    finish(Command(ESPER, "resume", "run", "data.workers=3", folder=tmp_path))
    (seen, weights, losses), (same, others, course) = outcome(tmp_path / "whole"), outcome(run)
    assert seen == same != 0
    assert losses == course
    assert weights.keys() == others.keys()
    assert all(torch.equal(value, others[name]) for name, value in weights.items())


def killed(command: Command, run: Path, tick: int) -> None:
    """Kills the rank of a run at a tick, with all that it has started."""
    try:
        command.until(lambda: mark(run).tick >= tick, f"tick {tick}")
        os.kill(command.worker(run, 0), signal.SIGKILL)
        assert command.end() != 0
        assert_gone(command, run)
    finally:
        command.clear()
