"""Runs on a real Slurm cluster of two nodes: preempted, requeued, out of time, cancelled, and as an array."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from esper.config.tree import read_plain
from esper.nissa.reading import read_events
from tests.slurm.conftest import Cluster
from tests.support.dist import ROOT
from tests.support.killed_runs import assert_same_run, final, live, prepare_run
from tests.support.wandb_file import offline_files, read_wandb_file

pytestmark = pytest.mark.slurm
TRAIN = str(ROOT / "slurm" / "train.sbatch")
SMALL = ("seed=1", "trainer.steps=40", "control.every=5", "checkpoint.every_ticks=20", "control.timeout_s=120")
SMALL += ("optim.schedule=constant",)  # made longer, it is then what would have been long from the beginning
WIDE = ("world.nproc_per_node=1",)
ALONE = ("world.nproc_per_node=1", "telemetry.wandb.mode=disabled")


def settings(go: Path) -> tuple[str, ...]:
    """A run that waits from its fourth tick on for the file ``go``."""
    path = "controller.path=tests.support.user_controllers:Waiting"
    return (*SMALL, "controller=custom", path, f"+controller.options.go={go}")


def variables(run: Path) -> dict[str, str]:
    return {"ESPER_ROOT": str(ROOT), "ESPER_RUN": str(run), "ESPER_PYTHON": sys.executable}


def status_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "STATUS.json").read_text())
    return found


def starts(run: Path) -> list[tuple[int, int | None]]:
    """Number of each attempt, and the step that it began at."""
    records = read_events(run / "events.jsonl")
    return [(r["attempt"], r["payload"]["resumed_from"]) for r in records if r["kind"] == "run_started"]


def ended(cluster: Cluster, job: str, state: str, log: Path) -> None:
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
    cluster.until(lambda: cluster.job(job)["JobState"] in over, f"the end of job {job}", log)
    assert cluster.job(job)["JobState"] == state, log.read_text()


def without_saves(outcome: dict[str, Any]) -> dict[str, Any]:
    """A stop adds a save of its own, and so a re-wrap; all else must be as it was."""
    events = [event for event in outcome["plain"]["events"] if event[0] != "rewrap"]
    return {**outcome, "plain": {**outcome["plain"], "events": events}}


def done_at_step_20(cluster: Cluster, run: Path, go: Path) -> None:
    """A run for two nodes that has ended, on this host, half way to where the others end."""
    words = (sys.executable, str(ROOT / "launch" / "train.py"), "launch=prepare", *settings(go), *WIDE)
    slurm = ("world.nnodes=2", "world.rdzv_endpoint=slurm")
    cluster.ask(*words, *slurm, f"run.dir={run}", "trainer.steps=20")
    go.touch()
    assert live(run, 2) == [0, 0]
    go.unlink()


@pytest.mark.parametrize("how", [pytest.param("new", marks=pytest.mark.slow), "extended"])
def test_a_run_on_two_nodes_is_preempted_requeued_and_ends_with_the_bits_of_an_undisturbed_one(
    cluster: Cluster, how: str
) -> None:
    """An urgent job needs both nodes; the run saves within the grace time, waits, and goes on under its wandb id.

    A run that is done and was made longer is preempted like one that is new, and comes to the same bits."""
    go, run, twin, log = (cluster.base / f"{how}-{name}" for name in ("go", "run", "twin", "log"))
    words: tuple[str, ...] = (*settings(go), *WIDE)
    if how == "extended":
        done_at_step_20(cluster, run, go)
        words = ("resume", "trainer.steps=40")
    job = cluster.submit("--nodes=2", f"--output={log}", TRAIN, *words, **variables(run))
    cluster.until(go.with_suffix(".waits").exists, "the tick that waits", log, job)
    assert {host.name for host in (run / "heartbeat").iterdir()} >= {"rank-00000", "rank-00001"}

    urgent = cluster.submit("-p", "urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    told = "workers save at the next tick and stop"
    cluster.until(lambda: log.read_text().count(told) == 3, "the word of the launcher and both hosts", log)
    go.touch()
    cluster.until(lambda: cluster.job(urgent)["JobState"] == "COMPLETED", "the urgent job", log)
    status = status_of(run)
    assert (status["status"], status["exit_code"]) == ("preempted", 75), status
    assert status["reason"] == f"SIGUSR1, job {job} makes room for another"
    assert 20 <= status["step"] < 40

    cluster.start_now(job)
    ended(cluster, job, "COMPLETED", log)
    assert cluster.job(job)["Restarts"] == "1"
    resumed = [None, status["step"]] if how == "new" else [None, 20, status["step"]]
    assert starts(run) == [*enumerate(resumed, start=1)]
    assert status_of(run)["status"] == "done"
    assert log.read_text().count("esper: starting 2 ranks") == 2, "settings were composed once, the run started twice"
    longer = [record["payload"] for record in read_events(run / "events.jsonl") if record["kind"] == "extended"]
    assert [(told["before"], told["after"]) for told in longer] == [(20, 40)] * (how == "extended")
    assert [path.name for path in run.glob("result-*.json")] == ["result-00000020.json"] * (how == "extended")

    prepare_run(twin, read_plain(run / "config.yaml"))
    assert live(twin, 2) == [0, 0], "the same run, undisturbed, on this host"
    assert_same_run(without_saves(final(run)), without_saves(final(twin)))
    ids = [read_wandb_file(path).run["id"] for path in offline_files(run)]
    assert ids == [json.loads((run / "attempt.json").read_text())["run_id"]] * len(resumed)


@pytest.mark.slow
def test_cancelled_out_of_time_and_warned_by_hand(cluster: Cluster) -> None:
    """Three jobs on one node each, side by side: scancel is the end, a warning and a time limit are requeued."""
    names = ("cancelled", "warned", "limited")
    go = {name: cluster.base / f"{name}.go" for name in names}
    run = {name: cluster.base / name for name in names}
    log = {name: cluster.base / f"{name}.log" for name in names}
    job = {}
    for name in names:
        # No warning from Slurm for the one whose time is short: its launcher watches the clock by itself.
        limit = ("--time=2", "--signal=CONT@1") if name == "limited" else ("--time=30",)
        words = (*limit, f"--output={log[name]}", TRAIN, *settings(go[name]), *ALONE, "world.grace_s=60")
        job[name] = cluster.submit(*words, **variables(run[name]))
    told = "workers save at the next tick and stop"
    for name in ("cancelled", "warned"):
        cluster.until(go[name].with_suffix(".waits").exists, "the fourth tick", log[name], job[name])
    cluster.ask("scancel", job["cancelled"])
    cluster.ask("scancel", "--batch", "--signal=USR1", job["warned"])
    for name in names:
        cluster.until(lambda name=name: told in log[name].read_text(), f"the word of {name}", log[name])
        go[name].touch()

    ended(cluster, job["cancelled"], "CANCELLED", log["cancelled"])
    cluster.until(lambda: "not requeued" in log["cancelled"].read_text(), "its last word", log["cancelled"])
    status = status_of(run["cancelled"])
    assert status["status"] == "preempted", status
    # SIGTERM to the launcher from Slurm, SIGUSR1 from the batch script: whichever comes first.
    why = f", job {job['cancelled']} was cancelled or is out of time"
    assert status["reason"] in (f"SIGTERM{why}", f"SIGUSR1{why}")
    assert f"not requeued: job {job['cancelled']} was cancelled" in log["cancelled"].read_text()

    for name, reason in (
        ("warned", f"SIGUSR1, job {job['warned']}"),
        ("limited", f"time limit of job {job['limited']} in "),
    ):
        cluster.start_now(job[name])
        assert status_of(run[name])["reason"].startswith(reason)
        ended(cluster, job[name], "COMPLETED", log[name])
        assert [number for number, _ in starts(run[name])] == [1, 2]
        assert status_of(run[name])["status"] == "done"


def test_a_run_that_does_not_get_on_is_not_requeued(cluster: Cluster) -> None:
    """Three attempts in a row without a new step are enough."""
    stuck, log = cluster.base / "stuck", cluster.base / "stuck.log"
    stuck.mkdir()
    status = {"status": "preempted", "exit_code": 75, "step": 20, "objective": None, "message": "stopped"}
    (stuck / "STATUS.json").write_text(json.dumps(status))
    (stuck / "requeues.json").write_text('{"step": 20, "idle": 2}')
    line = f"{sys.executable} -m esper.cli requeue {stuck}; echo code $?"
    job = cluster.submit(f"--output={log}", "--requeue", "--wrap", line)
    ended(cluster, job, "COMPLETED", log)
    assert log.read_text() == (
        f"esper: not requeued: 3 attempts in a row saved no step after 20; see {stuck}\ncode 75\n"
    )
    assert cluster.job(job)["Restarts"] == "0"


@pytest.mark.slow
def test_a_sweep_is_composed_once_and_runs_as_an_array(cluster: Cluster) -> None:
    out, folder = cluster.base / "sweep", cluster.base / "submitted"
    folder.mkdir()
    words = ("bash", str(ROOT / "slurm" / "sweep.sbatch"), "--parsable", "--output=%a.log", "--", str(out))
    line = (*words, "seed=1,2", *SMALL[1:], *ALONE)
    told = cluster.ask(*line, folder=folder, ESPER_PYTHON=sys.executable)
    job = told.splitlines()[-1]
    for task in "01":
        number = f"{job}_{task}"
        ended(cluster, number, "COMPLETED", folder / f"{task}.log")
        assert status_of(out / task)["status"] == "done"
    assert [f"seed: {seed}\n" in (out / str(seed - 1) / "config.yaml").read_text() for seed in (1, 2)] == [True, True]
    again = cluster.ask(*line, folder=folder, ESPER_PYTHON=sys.executable)
    assert again.splitlines()[-1] == f"esper: every run in {out} is done"


def test_a_comparison_is_an_array_over_seeds_and_a_last_job_writes_the_table(cluster: Cluster) -> None:
    out, folder = cluster.base / "comparison", cluster.base / "compared"
    folder.mkdir()
    own = folder / "two.yaml"
    base = [*SMALL[1:], "telemetry.wandb.mode=disabled", "world=cpu", "world.nproc_per_node=1"]
    arms = {"none": {"overrides": ["controller=none"]}, "random": {"overrides": ["controller=random", "gates=observe"]}}
    plan = {"base": base, "seeds": [1, 2], "metric": "accuracy", "subject": "random", "flops_share": 1.0}
    plan |= {"margin": 0.01, "arms": arms}
    own.write_text(json.dumps(plan))
    words = ("bash", str(ROOT / "slurm" / "compare.sbatch"), "--", "2", str(out), str(own), "seeds=[3,4]")
    told = cluster.ask(*words, folder=folder, ESPER_PYTHON=sys.executable)
    runs, last = (line.split()[-1] for line in told.splitlines())
    for task in "01":
        ended(cluster, f"{runs}_{task}", "COMPLETED", folder / f"slurm-{runs}_{task}.out")
    ended(cluster, last, "COMPLETED", folder / f"slurm-{last}.out")
    assert (out / "compare.html").stat().st_size > 10_000
    kept = json.loads((out / "compare.json").read_text())
    assert sorted(kept["runs"]) == ["none/3", "none/4", "random/3", "random/4"]
    assert not kept["failures"]
