"""A run under kills: its commands, its processes, its progress and its result."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.launcher.processes import descendants_of
from esper.tolaria.checkpoint.store import CheckpointStore

ROOT = Path(__file__).resolve().parents[2]
# A save at every tick: one that a stop asks for comes where there is one anyway.
SETTINGS = (
    "experiment=demo",
    "seed=1",
    "trainer.steps=300",
    "control.every=5",
    "checkpoint.every_ticks=1",
    "checkpoint.keep=3",
    "control.timeout_s=10",
    "control.slow_timeout_s=10",
    "control.startup_timeout_s=30",
    "world.max_restarts=50",
    "telemetry.console=off",
    "telemetry.wandb.mode=disabled",
)
# The victims, and the signals that a scheduler, the kernel or a person sends to them. The agent ignores stop signals. A
# stopped launcher or agent is left out: it is like a stopped machine, on which no process could notice it.
VICTIMS: dict[str, tuple[str, ...]] = {
    "rank 0": ("SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR1", "SIGSEGV", "SIGSTOP"),
    "rank 1": ("SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR1", "SIGABRT", "SIGSTOP"),
    "rank 2": ("SIGKILL", "SIGKILL", "SIGTERM", "SIGUSR1", "SIGSEGV", "SIGSTOP"),
    "all ranks": ("SIGKILL",),
    "agent": ("SIGKILL",),
    "launcher": ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1"),
    "everything": ("SIGKILL",),
}


class Failed(Exception):
    """A round failed; the text says how."""


@dataclass(slots=True)
class Kill:
    """One kill and its cost.

    Fields:
        victim: a key of `VICTIMS`.
        signal: by name.
        step: of rank 0's last mark.
        phase: of rank 0's last mark.
        at: time of the kill, by the monotonic clock.
        attempt: number of the attempt that it hit.
        again_s: seconds until ranks trained again; None if they did not.
        lost: optimizer steps that were repeated.
    """

    victim: str
    signal: str
    step: int
    phase: str
    at: float
    attempt: int
    again_s: float | None = None
    lost: int = 0


class Run:
    """A run directory and the command that works on it now."""

    def __init__(self, folder: Path, ranks: int = 2) -> None:
        self.folder, self.log, self.ranks = folder, folder.with_suffix(".log"), ranks
        self.store = CheckpointStore(folder / "checkpoints", attempt=0, keep=1)
        self.command: subprocess.Popen[bytes] | None = None
        self.newest = 0

    def start(self) -> None:
        """Starts the run, or goes on with it."""
        known = (self.folder / "config.yaml").is_file()
        resume = [sys.executable, "-m", "esper.cli", "resume", str(self.folder)]
        train = [sys.executable, str(ROOT / "launch" / "train.py"), *SETTINGS, f"run.dir={self.folder}"]
        train.append(f"world.nproc_per_node={self.ranks}")
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with self.log.open("ab") as log:
            self.command = subprocess.Popen(
                resume if known else train, stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}
            )

    def processes(self) -> dict[str, list[int]]:
        """The process ids of every victim that exists now."""
        assert self.command is not None
        pids_of: dict[str, list[int]] = {"launcher": [self.command.pid]}
        for pid in descendants_of(self.command.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:  # it ended meanwhile
                continue
            if b"esper.launcher.agent" in words:
                pids_of["agent" if os.getsid(pid) == pid else "rank server"] = [pid]
            elif b"esper.worker" in words:
                rank = next((v[5:].decode() for v in [*words, *variables] if v.startswith(b"RANK=")), "")
                pids_of[f"rank {rank}"] = [pid]
        ranks = [pid for name, pids in pids_of.items() if name.startswith("rank") for pid in pids]
        if ranks:
            pids_of |= {"all ranks": ranks, "everything": [self.command.pid, *pids_of.get("agent", []), *ranks]}
        return pids_of

    def mark(self) -> tuple[int, str]:
        """Step and phase of rank 0's last mark."""
        try:
            step, _, phase, *_ = json.loads((self.folder / "heartbeat" / "rank-00000").read_bytes())
        except (OSError, ValueError):
            return 0, ""
        return step, phase

    def attempt(self) -> int:
        """Number of the latest attempt."""
        try:
            return int(json.loads((self.folder / "attempt.json").read_text())["number"])
        except (OSError, ValueError):
            return 0

    def check_newest(self) -> None:
        """Checks that the newest checkpoint has not become an older one."""
        steps = self.store.steps()
        if (steps[0] if steps else 0) < self.newest:
            raise Failed(f"the newest checkpoint was step {self.newest}, now there are {steps}")
        self.newest = steps[0] if steps else 0

    def wait_for_processes(self) -> None:
        """Waits until no process works on the run; kills what is left after a minute and fails."""
        deadline = time.monotonic() + 60.0
        while left := _working_on(self.folder):
            if time.monotonic() > deadline:
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                raise Failed(f"processes {left} were left behind")
            time.sleep(0.05)

    def end(self) -> None:
        """Kills the command and its processes if they still run, after a failure."""
        if self.command is not None and self.command.poll() is None:
            for pid in {*descendants_of(self.command.pid), self.command.pid}:
                os.kill(pid, signal.SIGKILL)
            self.command.wait()


def _working_on(folder: Path) -> list[int]:
    """The live processes whose command line names the folder."""
    pids = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            line, stat = (Path("/proc", entry, name).read_bytes() for name in ("cmdline", "stat"))
        except OSError:
            continue
        if str(folder).encode() in line and stat.rsplit(b")", 1)[1].split()[0] != b"Z":
            pids.append(int(entry))
    return pids


def outcome(run: Run) -> dict[str, Any]:
    """The result of a run: every value of the last checkpoint by its path, and result.json."""
    values: dict[str, Any] = {}

    def collect(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, item in value.items():
                collect(item, f"{path}/{key}")
        elif isinstance(value, Tensor):
            raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            values[path] = (str(value.dtype), tuple(value.shape), raw)
        else:
            values[path] = value

    step = run.store.steps()[0]
    for name in run.store.verify(step).files:
        collect(run.store.load(step, name), name)
    del values["state.pt/run_id"]
    return {**values, "step": step, "result": json.loads((run.folder / "result.json").read_text())}


def strike(run: Run, rng: random.Random) -> Kill | None:
    """Sends one signal to one victim, drawn from those that exist; None if none could be reached."""
    victims = run.processes()
    victim = rng.choice([name for name in VICTIMS if name in victims])
    name = rng.choice(VICTIMS[victim])
    step, phase = run.mark()
    kill = Kill(victim, name, step, phase, time.monotonic(), run.attempt())
    sent = 0
    for pid in victims[victim]:
        try:
            os.kill(pid, signal.Signals[name])
            sent += 1
        except ProcessLookupError:  # it ended meanwhile
            continue
    return kill if sent else None
