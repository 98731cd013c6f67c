"""Slurm: the job that a run is in, the job's machines and time limit, and putting the job back into the queue.

    batch script (first host) -> launcher -> srun -> esper.launcher.one_host on every host -> torchrun -> ranks

``world.rdzv_endpoint=slurm`` asks for this. The rendezvous is on the job's first host. Its port and name come from job
id and restart count, so that a requeued job never meets processes that are left of its previous start.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from esper.leyline.errors import ASKED_IN_WANDB, ConfigError, EsperError
from esper.leyline.files import write_json
from esper.run.directory import read_status
from esper.tolaria.ranks.config import WorldConfig

FROM_SLURM = "slurm"  # a word in place of world.rdzv_endpoint and world.rdzv_id
REQUEUES = "requeues.json"
MAX_IDLE = 3  # attempts in a row that saved no new step
_PATIENCE_S = 20.0
_FIRST_SPECIAL_STEP = 4_294_967_280  # above it the batch script's own step, and the shell of an salloc
_FIRST_PORT, _PORTS = 20_000, 12_000  # below Linux's ephemeral ports


def _ask(*words: str) -> str:
    """Runs a Slurm command; returns its output.

    Raises:
        EsperError: the command is missing, fails, or does not answer.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_S)
    except FileNotFoundError:
        raise EsperError(f"{words[0]}: not found; Slurm's commands must be on the PATH of the job") from None
    except subprocess.TimeoutExpired:
        raise EsperError(f"{' '.join(words)}: no answer in {_PATIENCE_S:g} s; is slurmctld up?") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise EsperError(f"{' '.join(words)}: {lines[-1]}")
    return done.stdout


def show_job(job: str) -> dict[str, str]:
    """The fields of ``scontrol show job`` (JobState, EndTime, Requeue, ...).

    Raises:
        EsperError: Slurm does not answer or does not know the job.
    """
    return dict(re.findall(r"(\S+?)=(\S*)", _ask("scontrol", "show", "job", "-o", job)))


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """The allocation that this process runs in.

    Fields:
        number: the job's id; in an array, the id of the task.
        restarts: how often it was requeued.
        hosts: its machines in Slurm's order; the batch script runs on the first.
    """

    number: str
    restarts: int
    hosts: tuple[str, ...]

    @property
    def endpoint(self) -> str:
        """``host:port`` of the rendezvous."""
        port = _FIRST_PORT + (int(self.number) * 31 + self.restarts) % _PORTS
        return f"{self.hosts[0]}:{port}"

    @property
    def rendezvous(self) -> str:
        """The name of the rendezvous, new after every requeue."""
        return f"{self.number}-{self.restarts}"


def find_job(world: WorldConfig, environ: Mapping[str, str] = os.environ) -> SlurmJob:
    """Finds the job that this process runs in.

    Raises:
        ConfigError: there is no job, or its number of hosts is not ``world.nnodes``.
        EsperError: Slurm's own commands fail.
    """
    number, nodes = environ.get("SLURM_JOB_ID"), environ.get("SLURM_JOB_NODELIST")
    if number is None or nodes is None:
        raise ConfigError(
            "world.rdzv_endpoint = 'slurm': this is no Slurm job; submit it with sbatch slurm/train.sbatch, or set "
            "world.rdzv_endpoint=<host:port of the first host>"
        )
    hosts = tuple(_ask("scontrol", "show", "hostnames", nodes).split())
    if len(hosts) != world.nnodes:
        raise ConfigError(
            f"world.nnodes = {world.nnodes}: job {number} has {len(hosts)} hosts ({nodes}); set "
            f"world.nnodes={len(hosts)}, or submit with --nodes={world.nnodes}"
        )
    return SlurmJob(number, int(environ.get("SLURM_RESTART_COUNT", "0")), hosts)


def check_single_task(environ: Mapping[str, str] = os.environ) -> None:
    """Refuses a launcher that srun has started once per rank: each would train the whole run by itself.

    Raises:
        ConfigError: this step has several tasks.
    """
    step = environ.get("SLURM_STEP_ID", "")
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS", "1")
    if step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP and tasks.isdecimal() and int(tasks) > 1:
        raise ConfigError(
            f"SLURM_NTASKS = {tasks}: srun starts this launcher {tasks} times, and each would train the whole run; use "
            "srun --ntasks=1 (the launcher starts the ranks: world.nproc_per_node, world.nnodes), or sbatch "
            "slurm/train.sbatch; of different runs start each with an srun of its own"
        )


def srun_command(job: SlurmJob, config_path: Path) -> list[str]:
    """The srun that starts `esper.launcher.one_host` once on every host of the job, and ends all when one fails."""
    if shutil.which("srun") is None:
        raise EsperError("srun: not found; Slurm's commands must be on the PATH of the job")
    hosts = str(len(job.hosts))
    share = [f"--cpus-per-task={os.environ['SLURM_CPUS_PER_TASK']}"] if "SLURM_CPUS_PER_TASK" in os.environ else []
    return [
        "srun",
        f"--nodes={hosts}",
        f"--ntasks={hosts}",
        "--ntasks-per-node=1",
        *share,
        "--export=ALL",
        "--unbuffered",
        "--kill-on-bad-exit=1",
        "--wait=0",
        sys.executable,
        "-m",
        "esper.launcher.one_host",
        str(config_path),
        job.endpoint,
        job.rendezvous,
    ]


class TimeLimit:
    """Reports that the job's time is nearly over, so that a run stops in time even where ``--signal`` is not set.

    Args:
        job: its id.
        margin_s: seconds before the limit at which to stop.
    """

    def __init__(self, job: str, margin_s: float) -> None:
        self._job, self._margin_s, self._ask_at = job, margin_s, 0.0

    def __call__(self) -> str | None:
        """Returns the reason to stop now, or None. Asks Slurm only near the known limit, which may have been moved."""
        now = time.monotonic()
        if now < self._ask_at:
            return None
        try:
            text = show_job(self._job).get("EndTime", "")
            left = time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S")) - time.time()
        except (EsperError, ValueError):  # slurmctld does not answer, or there is no limit ("Unknown")
            self._ask_at = now + 60.0
            return None
        if left <= self._margin_s:
            return f"time limit of job {self._job} in {max(left, 0.0):.0f} s"
        self._ask_at = now + min(left - self._margin_s, 600.0)
        return None


def explain_stop(stopped: str, environ: Mapping[str, str] = os.environ) -> str:
    """Adds Slurm's reason to that of a stop: cancelled, preempted, or neither. Every warning arrives as SIGUSR1."""
    number = environ["SLURM_JOB_ID"]
    if f"job {number}" in stopped:
        return stopped
    try:
        fields = show_job(number)
    except EsperError:  # the run is saved; it does not matter that slurmctld does not answer
        return f"{stopped}, job {number}"
    if fields.get("JobState") != "RUNNING":
        return f"{stopped}, job {number} {_state_in_words(fields)}"
    if fields.get("PreemptTime", "None") != "None":
        return f"{stopped}, job {number} makes room for another"
    return f"{stopped}, job {number}"


def _state_in_words(fields: dict[str, str]) -> str:
    """Describes why a job ends. Slurm calls a job that it is ending COMPLETING, whatever the cause."""
    state = fields.get("JobState")
    return "was cancelled or is out of time" if state == "COMPLETING" else f"is {state}"


def requeue(run_dir: Path, environ: Mapping[str, str] = os.environ) -> tuple[bool, str]:
    """Puts the job that this process runs in back into the queue, if its run was stopped and makes progress.

    A job is not requeued after ``scancel``, after its time limit has ended it, after a failure, or after `MAX_IDLE`
    attempts without a new step. Slurm ends the batch script at once, so a call must be the script's last command.

    Returns:
        Whether it was requeued, and one line that says so.

    Raises:
        EsperError: Slurm's commands fail.
        RunDirError: RUN cannot be read.
    """
    number = environ.get("SLURM_JOB_ID")
    if number is None:
        return False, "not requeued: this is no Slurm job"
    status, _ = read_status(run_dir)
    if status is None or status["status"] != "preempted":
        return False, f"not requeued: {run_dir} is {'no run' if status is None else status['status']}"
    if str(status.get("message", "")).endswith(ASKED_IN_WANDB):
        return False, f"not requeued: somebody stopped it in wandb's page; to go on: esper resume {run_dir}"
    fields = show_job(number)
    if fields.get("JobState") != "RUNNING":  # CANCELLED, TIMEOUT; or PREEMPTED, which Slurm requeues itself
        return False, f"not requeued: job {number} {_state_in_words(fields)}"
    if fields.get("Requeue") != "1":
        return False, f"not requeued: job {number} was submitted with --no-requeue; to go on: esper resume {run_dir}"
    step, idle = status["step"] or 0, 0
    path = run_dir / REQUEUES
    if path.is_file():
        before = read_requeues(path)
        idle = before["idle"] + 1 if step <= before["step"] else 0
    if idle >= MAX_IDLE:
        return False, f"not requeued: {idle} attempts in a row saved no step after {step}; see {run_dir}"
    write_json(path, {"step": step, "idle": idle})
    _ask("scontrol", "requeue", number)
    return True, f"job {number} requeued at step {step}"


def read_requeues(path: Path) -> dict[str, int]:
    """Reads the step at the last requeue, and how many attempts in a row before it saved no new step.

    Raises:
        EsperError: the file is damaged.
    """
    try:
        plain = json.loads(path.read_text())
        return {"step": int(plain["step"]), "idle": int(plain["idle"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EsperError(f"{path}: not readable ({error}); remove it to requeue") from None
