"""Runs the jobs of a comparison: each is one run of one arm, in a process of its own.

A run lies in OUT/runs/<digest of its config>. So a command that was stopped goes on where it was, finished runs are
never repeated, and a changed arm is a new run. A run that finished on other data than those that are here now is
refused by name. Each job has its own launcher and torchrun, and GPUs of its own where it wants some.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.compare.arms import CompareConfig, derive, read_result
from esper.compare.devices import Devices, on_gpu, visible_gpus
from esper.compare.lengths import DataCache
from esper.config.digest import config_digest
from esper.config.tree import EsperConfig, build_config
from esper.launcher.ahead.forks import LOADED, ForkedRank, RankServer, launch_server
from esper.launcher.ahead.torchrun import torchrun_environment
from esper.leyline.errors import EsperError, RunDirError, one_line
from esper.leyline.files import RunDir
from esper.run.directory import hold_run, read_status
from esper.run.lock import LOCKED

QUIET = {"console": "off", "level": "full"}
STOP = signal.SIGUSR1  # workers and launchers take it as often as it comes; a second SIGTERM would end them unsaved


@dataclass(frozen=True, slots=True)
class ArmJob:
    """One run of one arm."""

    arm: str
    seed: int


class Stopped(Exception):
    """A job did not begin because the command is being stopped."""


def jobs_of(config: CompareConfig) -> list[ArmJob]:
    """Every run of a comparison: seed by seed, arms that others wait for first."""
    return [ArmJob(arm, seed) for seed in config.seeds for arm in config.in_order()]


def run_folder(out: Path, plain: dict[str, Any]) -> Path:
    """The folder of a run: a function of every setting that changes what is computed."""
    return out / "runs" / f"{config_digest(plain):016x}"


class Comparer:
    """Runs the jobs of a comparison.

    Fields:
        folders: the folder of each run known so far, by (arm, seed).
        failures: the error of each job that failed, by (arm, seed).
        stopping: set once the command is being stopped.
    """

    def __init__(self, config: CompareConfig, out: Path, say: Callable[[str], None]) -> None:
        # Ranks are told of the lock on their RUN by its whole path.
        self.config, self.out, self.say = config, out.absolute(), say
        self.data = DataCache()
        self._gpus = Devices(visible_gpus())
        self._running: dict[Path, threading.Lock] = {}  # two arms may have the same config
        self.folders: dict[tuple[str, int], Path] = {}
        self.failures: dict[tuple[str, int], str] = {}
        self.stopping = threading.Event()
        self._children: set[subprocess.Popen[bytes] | ForkedRank] = set()
        self._servers: dict[tuple[str | None, ...], RankServer] = {}  # by what libraries read while they are loaded
        self._lock, self._deriving = threading.Lock(), threading.Lock()

    def done(self, folder: Path, config: EsperConfig) -> bool:
        """Whether a run has finished, on the data that are here now.

        Raises:
            RunDirError: its files cannot be read, or it was trained on other data.
        """
        status, _ = read_status(folder)
        if status is None or status["status"] != "done":
            return False
        digest, now = read_result(folder)["data"]["digest"], self.data(config.data).digest
        if digest != now:
            raise RunDirError(
                f"{folder}: finished on other data (digest {digest}, now {now}); give those back (data.root, "
                "ESPER_DATA), or name another folder with --out"
            )
        return True

    def run(self, job: ArmJob) -> Path:
        """Runs a job to its end, unless its run has finished already; returns the run's folder.

        Raises:
            EsperError: the job failed, or one that it is derived from did.
            Stopped: the command is being stopped.
        """
        arm = self.config.arms[job.arm]
        missing = sorted(other for other in arm.waits_for if (other, job.seed) not in self.folders)
        if missing and self.stopping.is_set():
            raise Stopped
        if missing:
            raise EsperError(f"derived from {', '.join(missing)}, which did not finish")
        before = {other: self.folders[other, job.seed] for other in arm.waits_for}
        with self._deriving:  # counting FLOPs puts hooks on every module of the process, also those of other threads
            config, plain = derive(self.config, job.arm, job.seed, before, self.data)
        folder = run_folder(self.out, plain)
        with self._lock:
            running = self._running.setdefault(folder, threading.Lock())
        with running:
            if not self.done(folder, config):
                self._execute(job, config, plain, folder)
        self.folders[job.arm, job.seed] = folder
        return folder

    def _execute(self, job: ArmJob, config: EsperConfig, plain: dict[str, Any], folder: Path) -> None:
        """Runs a job in a process of its own."""
        if self.stopping.is_set():
            raise Stopped
        plain["run"] |= {"dir": str(folder), "resume": "auto", "name": f"{job.arm}-{job.seed}", "group": "compare"}
        plain["telemetry"] |= QUIET
        config = build_config(plain)
        log = folder / "console.log"
        alone = config.world.nproc_per_node * config.world.nnodes == 1
        with contextlib.ExitStack() as held, contextlib.ExitStack() as lock:
            lock.enter_context(hold_run(config.run, plain))
            if self.done(folder, config):  # another command on the same folder was faster
                return
            gpus = held.enter_context(self._gpus.take(config.world.nproc_per_node if on_gpu(config) else 0))
            variables = {**os.environ, **torchrun_environment(config.world, config.trainer), **gpus}
            if alone:  # one rank needs no torchrun: its worker runs under our lock
                arguments, variables[LOCKED] = [str(RunDir(folder).config)], str(folder)
                code = self._wait(lambda: self._server(variables).start("esper.worker", arguments, variables, log))
            else:
                lock.close()  # the launcher of the run takes the lock itself
                command = [sys.executable, "-m", "esper.cli", "resume", str(folder)]
                code = self._wait(lambda: _start(command, log, variables))
        done, stopped = self.done(folder, config), self.stopping.is_set()
        if stopped and not done:
            raise Stopped
        if not done or (code and not stopped):  # a stop may reach a run that is done and about to exit
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise EsperError(f"{last[0]} (its output: {log})")

    def _server(self, variables: dict[str, str]) -> RankServer:
        """The process that forks the ranks of runs with such variables; it imports what they need, once for all."""
        key = tuple(variables.get(name) for name in LOADED)
        with self._lock:
            if key not in self._servers:
                self._servers[key] = launch_server("esper.worker", variables)
            return self._servers[key]

    def _wait(self, start: "Callable[[], subprocess.Popen[bytes] | ForkedRank]") -> int:
        """Starts a process, waits for its end, and returns its exit code.

        Raises:
            EsperError: it cannot be started.
        """
        try:
            child = start()
        except OSError as error:
            raise EsperError(f"a run cannot be started: {error}") from None
        with self._lock:
            self._children.add(child)
        try:
            if self.stopping.is_set():  # the stop came between the check and the start
                child.send_signal(STOP)
            return child.wait()
        finally:
            with self._lock:
                self._children.discard(child)

    def stop(self) -> None:
        """Lets no further job begin, and asks those under way to save and end."""
        self.stopping.set()
        with self._lock:
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(STOP)

    def run_all(self, jobs: Sequence[ArmJob], parallel: int) -> None:
        """Runs jobs, ``parallel`` at a time; a job that fails does not stop the others."""
        futures: dict[ArmJob, Future[None]] = {}
        total, began = len(jobs), time.monotonic()
        finished = 0

        def work(job: ArmJob) -> None:
            nonlocal finished
            for other in self.config.arms[job.arm].waits_for:  # submitted before this one, so it runs or has ended
                ahead = futures.get(ArmJob(other, job.seed))
                if ahead is not None:
                    ahead.exception()
            try:
                folder = self.run(job)
                text = f"{job.arm} seed {job.seed}: {folder}"
            except Stopped:
                return
            except EsperError as error:
                self.failures[job.arm, job.seed] = one_line(error)
                text = f"{job.arm} seed {job.seed} FAILED: {one_line(error)}"
            with self._lock:
                finished += 1
                self.say(f"[{finished}/{total}, {time.monotonic() - began:.0f} s] {text}")

        try:
            with ThreadPoolExecutor(parallel) as pool:
                for job in jobs:
                    futures[job] = pool.submit(work, job)
                for future in futures.values():
                    future.result()
        finally:
            while self._servers:
                self._servers.popitem()[1].close()


def _start(command: list[str], log: Path, variables: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Starts a command in a session of its own; what it says is added to a file."""
    with log.open("ab") as stream:
        return subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True, env=variables)


@contextlib.contextmanager
def stopped_by_signals(comparer: Comparer) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks every run to save; the command then ends with the code of a preemption."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda *_: comparer.stop()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
