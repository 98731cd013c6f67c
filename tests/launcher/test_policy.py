"""The training of a policy as a command: composed, checked, started, stopped, resumed, evaluated."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from esper.config.strict import defaults_of
from esper.launcher import policy
from esper.leyline.fields import class_doc, field_docs
from esper.leyline.files import package_folder
from esper.run.learning import reference, worker
from esper.run.learning.config import own_classes
from esper.simic.ppo.saves import checkpoints, load_shared
from tests.support.dist import run_distributed

SETTINGS = [
    "env.name=gated",
    "agent.width=16",
    "agent.hidden=8",
    "learn.envs=4",
    "learn.episodes=1",
    "ppo.ticks=16",
    "ppo.gamma=0.9",
    "ppo.epochs=1",
    "ppo.minibatches=2",
    "world.nproc_per_node=2",
    "telemetry.wandb.mode=disabled",
]


def prepare(folder: Path, *settings: str) -> Path:
    words = [*SETTINGS, f"run.dir={folder}", "launch=prepare", *settings]
    assert policy.main(["train", *words]) == 0
    return folder / "config.yaml"


def updates_of(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "events.jsonl").read_text().splitlines() if (folder / "events.jsonl").exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}}")]
    return [record["payload"]["numbers"] for record in records if record["kind"] == "policy_update"]


def work(rank: int, config: Path, stop_at: int | None) -> int:
    if stop_at is not None and rank == 1:

        def stop_later() -> None:
            while len(updates_of(config.parent)) < stop_at:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGUSR1)

        threading.Thread(target=stop_later, daemon=True).start()
    return worker.run(config)


def test_stopped_on_one_rank_and_resumed_it_has_the_same_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = (prepare(tmp_path / name, "learn.updates=10") for name in ("whole", "parts"))
    assert run_distributed(work, 2, whole, None) == [0, 0]
    assert run_distributed(work, 2, parts, 2) == [0, 0]
    status = json.loads((parts.parent / "STATUS.json").read_text())
    assert status["status"] == "preempted"
    assert "of 10" in status["message"]
    assert len(updates_of(parts.parent)) < 10
    assert run_distributed(work, 2, parts, None) == [0, 0]
    one, other = (
        [{k: v for k, v in numbers.items() if k != "charts/SPS"} for numbers in updates_of(path.parent)]
        for path in (whole, parts)
    )
    assert one == other
    ends = [load_shared(checkpoints(path.parent / "checkpoints")[-1]) for path in (whole, parts)]
    assert all(torch.equal(tensor, ends[1]["agent"][name]) for name, tensor in ends[0]["agent"].items())
    results = [json.loads((path.parent / "result.json").read_text()) for path in (whole, parts)]
    assert results[0] == results[1]
    capsys.readouterr()
    assert policy.main(["evaluate", str(parts.parent), "--episodes", "1"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["greedy"]["episodes"] == 4
    assert shown["checkpoint"] == "update-00000010"
    assert policy.main(["resume", str(parts.parent)]) == 0  # done: says so and starts nothing
    assert "done" in capsys.readouterr().out


def test_every_problem_is_told_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["env.name=chess", "ppo.lam=2", "learn.updates=0", f"run.dir={tmp_path / 'run'}"]
    assert policy.main(["train", *wrong]) == 78
    told = capsys.readouterr().err
    for part in ("env.name = 'chess': no such environment", "ppo.lam = 2", "learn.updates = 0: must be >= 1"):
        assert part in told
    assert policy.main(["train", "ppo.minibatches=3", f"run.dir={tmp_path / 'run'}"]) == 78
    assert "must divide the 16 environments" in capsys.readouterr().err
    assert policy.main(["train", "ppo.lrr=1"]) == 78
    assert "ppo.lrr: no such setting" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert policy.main(["resume", str(tmp_path)]) == 74
    assert "no config.yaml in it" in capsys.readouterr().err
    prepare(tmp_path / "begun")
    capsys.readouterr()
    assert policy.main(["evaluate", str(tmp_path / "begun")]) == 74
    assert "no checkpoint yet" in capsys.readouterr().err


def test_a_plan_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert policy.main(["train", *SETTINGS, f"run.dir={tmp_path / 'run'}", "launch=plan"]) == 0
    assert "-m esper.run.learning.worker" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_launcher_stops_and_resumes_torchrun(tmp_path: Path) -> None:
    import subprocess
    import sys

    script = package_folder().parent / "launch" / "policy.py"
    words = [sys.executable, str(script), "train", *SETTINGS, f"run.dir={tmp_path / 'run'}", "learn.updates=100"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as child:
        while len(updates_of(tmp_path / "run")) < 3 and child.poll() is None:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        assert child.wait() == 75
    done = subprocess.run([sys.executable, str(script), "resume", str(tmp_path / "run")], cwd=tmp_path)
    assert done.returncode == 0
    assert len(updates_of(tmp_path / "run")) == 100


def test_the_committed_page_is_what_the_command_prints() -> None:
    committed = (package_folder().parent / "docs" / "policy-configuration.md").read_text()
    assert committed == reference.page(), "python -m esper.run.learning.reference > docs/policy-configuration.md"


@pytest.mark.parametrize("cls", own_classes(), ids=lambda cls: cls.__name__)
def test_every_setting_says_what_it_means(cls: type) -> None:
    assert class_doc(cls)
    assert sorted(field_docs(cls)) == sorted(defaults_of(cls))
