"""What Slurm's absence is called, and how the hosts of a job find each other; a real cluster is in tests/slurm/."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from esper.launcher import compose as launcher
from esper.launcher.ahead.torchrun import torchrun_arguments
from esper.launcher.slurm import SlurmJob, find_job, read_requeues, requeue
from esper.leyline.errors import ASKED_IN_WANDB, ConfigError
from esper.leyline.files import write_json
from esper.tolaria.ranks.config import WorldConfig
from tests.support.dist import ROOT


def test_a_rendezvous_is_on_the_first_host_and_new_after_each_requeue() -> None:
    jobs = [SlurmJob(str(number), restarts, ("node7", "node2")) for number in (11, 12) for restarts in range(3)]
    assert len({job.endpoint for job in jobs}) == len({job.rendezvous for job in jobs}) == len(jobs)
    for job in jobs:
        host, port = job.endpoint.split(":")
        assert host == "node7"
        assert 20_000 <= int(port) < 32_000


def test_each_host_knows_whether_the_rendezvous_is_its_own() -> None:
    world = WorldConfig(nnodes=2, rdzv_endpoint="node7:20001", rdzv_id="11-0")
    for first in (True, False):
        words = torchrun_arguments(world, Path("/r/config.yaml"), is_first=first, own_name="node2", patience_s=90.0)
        assert f"--rdzv-conf=is_host={int(first)},join_timeout=90" in words
        assert "--local-addr=node2" in words
    alone = torchrun_arguments(WorldConfig(rdzv_endpoint="slurm"), Path("/r/config.yaml"))
    assert {"--rdzv-endpoint=localhost:0", "--local-addr=localhost"} <= set(alone)


def test_outside_of_a_job_it_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"this is no Slurm job; submit it with sbatch slurm/train\.sbatch"):
        find_job(WorldConfig(rdzv_endpoint="slurm"), {})
    assert launcher.main([f"run.dir={tmp_path / 'run'}", "world.rdzv_endpoint=slurm", "world.nnodes=2"]) == 78
    assert capsys.readouterr().err.count("this is no Slurm job") == 1
    assert not (tmp_path / "run").exists()
    assert requeue(tmp_path, {}) == (False, "not requeued: this is no Slurm job")


@pytest.mark.parametrize("kind", ["done", "failed", "diverged"])
def test_only_a_stopped_run_is_requeued(tmp_path: Path, kind: str) -> None:
    write_json(tmp_path / "STATUS.json", {"status": kind, "step": 3})
    assert requeue(tmp_path, {"SLURM_JOB_ID": "5"}) == (False, f"not requeued: {tmp_path} is {kind}")


def test_a_run_that_was_stopped_in_wandb_is_not_requeued(tmp_path: Path) -> None:
    write_json(tmp_path / "STATUS.json", {"status": "preempted", "step": 3, "message": f"stopped{ASKED_IN_WANDB}"})
    requeued, line = requeue(tmp_path, {"SLURM_JOB_ID": "5"})
    assert not requeued
    assert line.startswith("not requeued: somebody stopped it in wandb's page; to go on: esper resume")


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
def test_a_job_resumes_with_changes_only_if_it_is_told_to(tmp_path: Path, known: bool) -> None:
    """The batch script's last part, with a Python that writes its arguments down; a requeued job repeats its words."""
    run, python, said = tmp_path / "run", tmp_path / "python", tmp_path / "said"
    python.write_text('#!/bin/sh\nprintf "%s " "$@" >> "$SAID"\necho >> "$SAID"\nexit 75\n')
    python.chmod(0o755)
    if known:
        run.mkdir()
        (run / "config.yaml").touch()
    words = {**os.environ, "ESPER_PYTHON": str(python), "SAID": str(said), "SLURM_JOB_NUM_NODES": "2"}
    for arguments in (["host=gpt"], ["resume", "trainer.steps=90"]):
        done = subprocess.run(["bash", str(ROOT / "slurm" / "job.sh"), str(run), *arguments], env=words)
        assert done.returncode == 75
    first = f"resume {run}" if known else f"train run.dir={run} world.nnodes=2 world.rdzv_endpoint=slurm host=gpt"
    lines = [first, f"requeue {run}", f"resume {run} trainer.steps=90", f"requeue {run}"]
    assert [line.strip() for line in said.read_text().splitlines()] == [f"-m esper.cli {line}" for line in lines]


@pytest.mark.parametrize("text", ["", "[]", '{"step": 3}', '{"step": null, "idle": 0}'])
def test_a_damaged_count_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "requeues.json"
    path.write_text(text)
    with pytest.raises(Exception, match=re.escape(f"{path}: not readable")):
        read_requeues(path)
