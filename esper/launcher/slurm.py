"""What Esper knows of Slurm: the job that it runs in, its hosts, its time, and whether it may begin again.

    batch script (first host) -> launcher -> srun -> esper.launcher.one_host on every host -> torchrun -> ranks

``world.rdzv_endpoint=slurm`` asks for this. The rendezvous lies on the job's first host; its port and name come from
job id and restart count, so that a requeued job never meets the remains of its former self.
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

from esper.leyline.errors import ConfigError, EsperError
from esper.leyline.files import write_json
from esper.run.directory import read_status
from esper.tolaria.ranks.config import WorldConfig

FROM_SLURM = "slurm"  # a word in place of world.rdzv_endpoint and world.rdzv_id
REQUEUES = "requeues.json"
MAX_IDLE = 3  # attempts in a row that saved no new step
_PATIENCE_S = 20.0
_FIRST_PORT, _PORTS = 20_000, 12_000  # below Linux's ephemeral ports


def _ask(*words: str) -> str:
    """A Slurm command's output.

    Raises:
        EsperError: it is not there, fails, or does not answer.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_S)
    except FileNotFoundError:
        raise EsperError(f"{words[0]}: not found; Slurm's commands must be on the PATH of the job") from None
    except subprocess.TimeoutExpired:
        raise EsperError(f"{' '.join(words)}: no answer in {_PATIENCE_S:g} s; is slurmctld up?") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise EsperError(f"{' '.join(words)}: {said[-1]}")
    return done.stdout


def show_job(job: str) -> dict[str, str]:
    """What ``scontrol show job`` says, field by field (JobState, EndTime, Requeue, ...).

    Raises:
        EsperError: Slurm does not answer or does not know the job.
    """
    return dict(re.findall(r"(\S+?)=(\S*)", _ask("scontrol", "show", "job", "-o", job)))


@dataclass(frozen=True, slots=True)
class SlurmJob:
    """The allocation that this process runs in.

    Args:
        number: its id; of an array task, the task's own. restarts: times that it was requeued.
        hosts: in Slurm's order; the batch script runs on the first.
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
        """Name of the rendezvous, new after every requeue."""
        return f"{self.number}-{self.restarts}"


def this_job(world: WorldConfig, environ: Mapping[str, str] = os.environ) -> SlurmJob:
    """The job around this process.

    Raises:
        ConfigError: there is none, or it has another number of hosts than ``world.nnodes``.
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


def srun_command(job: SlurmJob, config_path: Path) -> list[str]:
    """Starts `esper.launcher.one_host` once on every host of the job; ends the others when one fails."""
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
    """Says once that the job's time is nearly over; a cut-off or unconfigured ``--signal`` then does not matter.

    Args:
        job: id. margin_s: seconds before the limit.
    """

    def __init__(self, job: str, margin_s: float) -> None:
        self._job, self._margin_s, self._ask_at = job, margin_s, 0.0

    def __call__(self) -> str | None:
        """The reason to stop now, or None. Asks Slurm only when the known limit is near: it may have been moved."""
        now = time.monotonic()
        if now < self._ask_at:
            return None
        try:
            text = show_job(self._job).get("EndTime", "")
            left = time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S")) - time.time()
        except (EsperError, ValueError):  # slurmctld is away, or there is no limit ("Unknown")
            self._ask_at = now + 60.0
            return None
        if left <= self._margin_s:
            return f"time limit of job {self._job} in {max(left, 0.0):.0f} s"
        self._ask_at = now + min(left - self._margin_s, 600.0)
        return None


def why(stopped: str, environ: Mapping[str, str] = os.environ) -> str:
    """What Slurm adds to the reason of a stop, which every warning calls SIGUSR1: cancelled, preempted, neither."""
    number = environ["SLURM_JOB_ID"]
    if f"job {number}" in stopped:
        return stopped
    try:
        said = show_job(number)
    except EsperError:  # the run is saved; a slurmctld that is away changes nothing
        return f"{stopped}, job {number}"
    if said.get("JobState") == "RUNNING":
        preempted = said.get("PreemptTime", "None") != "None"
        return f"{stopped}, job {number}" + " makes room for another" * preempted
    return f"{stopped}, job {number} {_ending(said)}"


def _ending(said: dict[str, str]) -> str:
    """Slurm calls a job that it is ending COMPLETING, whatever the cause."""
    state = said.get("JobState")
    return "was cancelled or is out of time" if state == "COMPLETING" else f"is {state}"


def requeue(run_dir: Path, environ: Mapping[str, str] = os.environ) -> tuple[bool, str]:
    """Puts the job around this process back into the queue if its run was stopped and is getting on.

    Not after ``scancel``, a time limit that struck, a failure, or `MAX_IDLE` attempts without a new step. Slurm ends
    the batch script at once, so nothing may come after a call.

    Returns:
        Whether it was requeued, and one line.

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
    said = show_job(number)
    if said.get("JobState") != "RUNNING":  # CANCELLED, TIMEOUT; or PREEMPTED, which Slurm requeues itself
        return False, f"not requeued: job {number} {_ending(said)}"
    if said.get("Requeue") != "1":
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
    """Step at the last requeue, and how many in a row brought none.

    Raises:
        EsperError: the file is damaged.
    """
    try:
        found = json.loads(path.read_text())
        return {"step": int(found["step"]), "idle": int(found["idle"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EsperError(f"{path}: not readable ({error}); remove it to requeue") from None
