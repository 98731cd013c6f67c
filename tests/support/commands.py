"""Whole commands as a person types them: started in a process of their own, watched, killed, and nothing left behind.

command = Command(TRAIN, "experiment=demo", f"run.dir={run}", folder=tmp_path)
command.until(lambda: mark(run).tick >= 5, "tick 5")
command.process.send_signal(signal.SIGTERM)
assert command.end() == 75, command.told()
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from esper.launcher.processes import descendants_of
from tests.support.dist import ROOT
from tests.support.patience import Patience, cpu_of, size_of, wait_until

TRAIN = [sys.executable, str(ROOT / "launch" / "train.py")]
ESPER = [sys.executable, "-m", "esper.cli"]
# The demo's task and controller, cut short: 20 ticks, a save at every fourth, two lives completed on the way.
LENGTH = ("trainer.steps=240", "control.every=12", "checkpoint.every_ticks=4", "checkpoint.keep=3")
GROWING = ("experiment=demo", "seed=1", *LENGTH)
NO_WANDB = "telemetry.wandb.mode=disabled"


def environment(folder: Path, **more: str) -> dict[str, str]:
    """This process's environment without what would change a run; wandb's own files go below ``folder``."""
    ours = ("WANDB_", "ESPER_", "TORCHELASTIC_", "STAND_IN")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        kept.pop(name, None)
    homes = {f"WANDB_{name}_DIR": str(folder / "wandb-home") for name in ("CACHE", "CONFIG", "DATA")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])  # where torchrun is
    return {**kept, **homes, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


class Command:
    """A running command line.

    Args:
        program, arguments: the words of the line. folder: its working directory; its output is kept there.
        more: environment variables.

    Attributes:
        process: what was started. seen: every process below it that was ever asked for.
    """

    count = 0

    def __init__(self, program: list[str], *arguments: str, folder: Path, **more: str) -> None:
        Command.count += 1
        self._files = [folder / f"command-{Command.count}.{name}" for name in ("out", "err")]
        with self._files[0].open("w") as out, self._files[1].open("w") as err:
            self.process = subprocess.Popen(
                [*program, *arguments], cwd=folder, env=environment(folder, **more), stdout=out, stderr=err
            )
        self.seen: set[int] = set()

    @property
    def out(self) -> str:
        """Its standard output until now."""
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        """Its standard error until now."""
        return self._files[1].read_text()

    def told(self) -> str:
        """Everything it said, for a failed assertion."""
        return f"{self.out}\n--- stderr\n{self.err}"

    def until(self, due: Callable[[], bool], what: str) -> None:
        """Returns once ``due``; fails when the command ends before, or gets on no more."""
        patience = self.patience()
        while not due():
            assert self.process.poll() is None, f"it ended with {self.process.poll()} before {what}\n{self.told()}"
            assert patience.lasts(), f"{what} did not come: {patience}\n{self.told()}"
            time.sleep(0.01)

    def end(self) -> int:
        """Its exit code, once it has one."""
        patience = self.patience()
        while self.process.poll() is None:
            assert patience.lasts(), f"it does not end: {patience}\n{self.told()}"
            time.sleep(0.02)
        return self.process.wait()

    def patience(self) -> Patience:
        """Lasts as long as it, or a process that it started, computes or says something."""
        return Patience(cpu_of(lambda: {self.process.pid, *self.below()}), size_of(*self._files))

    def below(self) -> set[int]:
        """Processes that it started, at any depth."""
        found = descendants_of(self.process.pid)
        self.seen |= found
        return found

    def worker(self, run: Path, rank: int) -> int:
        """Process id of a rank that works on a run."""
        for pid in self.below():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:  # it ended meanwhile
                continue
            # a rank that was forked says so among its words, one that Python started among its variables
            if str(run / "config.yaml").encode() in words and f"RANK={rank}".encode() in [*words, *variables]:
                return pid
        raise AssertionError(f"no rank {rank} of {run}\n{self.told()}")

    @contextlib.contextmanager
    def held(self, run: Path, rank: int = 0) -> Iterator[None]:
        """Stops a rank within the block, so that the run gets no further before a signal has gone its way."""
        pid = self.worker(run, rank)
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def clear(self) -> None:
        """Ends what is left of it, by process id."""
        for pid in {*self.below(), *self.seen, self.process.pid}:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


def alive(pid: int) -> bool:
    """Whether a process runs (one that is dead and waits to be noticed does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def processes_on(run: Path) -> list[int]:
    """Live processes whose command line names something in the run directory."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and alive(int(entry)):
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if str(run).encode() in line:
                found.append(int(entry))
    return found


def assert_gone(command: Command, run: Path) -> None:
    """Nothing that the command ever started is left, and nothing works on the run."""

    def left() -> list[int]:
        return [*processes_on(run), *(pid for pid in command.seen if alive(pid))]

    wait_until(lambda: not left(), f"the end of what works on {run}", Patience(cpu_of(left)))


@dataclass(frozen=True, slots=True)
class Where:
    """Where rank 0 of a run says that it is."""

    step: int
    tick: int
    phase: str


def mark(run: Path) -> Where:
    """Rank 0's last mark; tick -1 before there is one."""
    try:
        step, tick, phase, *_ = json.loads((run / "heartbeat" / "rank-00000").read_bytes())
    except (OSError, ValueError):
        return Where(0, -1, "")
    return Where(step, tick, phase)


def saved(run: Path, step: int) -> Callable[[], bool]:
    """Whether the checkpoint of a step stands."""
    return (run / "checkpoints" / f"step-{step:08d}").exists


def free_port() -> int:
    """A port of this host that nobody listened at a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
