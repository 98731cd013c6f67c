"""``esper compare NAME``: arms x seeds, run where they have not been run yet, then one table and one page.

A run lies in OUT/runs/<digest of its config>: whatever stops the command, the same command goes on, finished runs are
never repeated, and a changed arm is a new run. Jobs are separate processes (each its own launcher and torchrun), as
many at a time as asked for. Machines or an array of Slurm tasks share the work by ``--share I/N`` (each takes every
N-th seed); afterwards ``--report`` puts together what lies in OUT.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from esper.arms import CompareConfig, derive
from esper.config import EsperConfig, build_config, config_digest
from esper.karn.comparison import Comparison, compare
from esper.karn.runs import RunRecord, read_run
from esper.leyline.errors import EsperError, Preempted, RunDirError, one_line
from esper.rundir import CONFIG, held_run, read_status, write_json
from esper.supervise import torchrun_environment
from esper.tolaria.config import Device

QUIET = {"console": "off", "level": "full"}
STOP = signal.SIGUSR1  # workers and launchers take it as often as it comes; a second SIGTERM would end them unsaved


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one arm."""

    arm: str
    seed: int


class Stopped(Exception):
    """A job was not begun because the command is being stopped."""


def jobs_of(config: CompareConfig) -> list[Job]:
    """Every run of a comparison: seed by seed, arms that others wait for first."""
    return [Job(arm, seed) for seed in config.seeds for arm in config.in_order()]


def run_folder(out: Path, plain: dict[str, Any]) -> Path:
    """Where a run lies: a function of every setting that changes what is computed."""
    return out / "runs" / f"{config_digest(plain):016x}"


class Comparer:
    """Runs the jobs of a comparison.

    Fields:
        folders: of the runs known so far, by (arm, seed). failures: what a job that failed said.
    """

    def __init__(self, config: CompareConfig, out: Path, say: Any) -> None:
        self.config, self.out, self.say = config, out, say
        self.folders: dict[tuple[str, int], Path] = {}
        self.failures: dict[tuple[str, int], str] = {}
        self.stopping = threading.Event()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock, self._deriving = threading.Lock(), threading.Lock()

    def done(self, folder: Path) -> bool:
        """Whether a run has finished."""
        status, _ = read_status(folder)
        return status is not None and status["status"] == "done"

    def run(self, job: Job) -> Path:
        """Runs a job to its end, or takes it from where it lies.

        Raises:
            EsperError: it failed, or one that it is derived from did. Stopped: the command is being stopped.
        """
        arm = self.config.arms[job.arm]
        missing = sorted(other for other in arm.waits_for if (other, job.seed) not in self.folders)
        if missing and self.stopping.is_set():
            raise Stopped
        if missing:
            raise EsperError(f"derived from {', '.join(missing)}, which did not finish")
        before = {other: self.folders[other, job.seed] for other in arm.waits_for}
        with self._deriving:  # counting FLOPs hooks every module of the process, those of other threads too
            config, plain = derive(self.config, job.arm, job.seed, before)
        folder = run_folder(self.out, plain)
        if not self.done(folder):
            self._execute(job, config, plain, folder)
        self.folders[job.arm, job.seed] = folder
        return folder

    def _execute(self, job: Job, config: EsperConfig, plain: dict[str, Any], folder: Path) -> None:
        if self.stopping.is_set():
            raise Stopped
        plain["run"] |= {"dir": str(folder), "resume": "auto", "name": f"{job.arm}-{job.seed}", "group": "compare"}
        plain["telemetry"] |= QUIET
        config = build_config(plain)
        log = folder / "console.log"
        alone = config.world.nproc_per_node * config.world.nnodes == 1
        with contextlib.ExitStack() as held:
            held.enter_context(held_run(config.run, plain))
            if alone:  # one rank needs no torchrun: its worker runs under our lock
                command = [sys.executable, "-m", "esper.worker", str(folder / CONFIG)]
            else:
                held.close()  # the launcher of the run takes the lock itself
                command = [sys.executable, "-m", "esper.cli", "resume", str(folder)]
            code = self._wait(command, log, torchrun_environment(config.world, config.trainer))
        if self.stopping.is_set() and not self.done(folder):
            raise Stopped
        if code or not self.done(folder):
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise EsperError(f"{last[0]} (its output: {log})")

    def _wait(self, command: list[str], log: Path, environment: dict[str, str]) -> int:
        with log.open("ab") as stream:
            child = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        with self._lock:
            self._children.add(child)
        try:
            if self.stopping.is_set():  # asked for between the check and the start
                child.send_signal(STOP)
            return child.wait()
        finally:
            with self._lock:
                self._children.discard(child)

    def stop(self) -> None:
        """Begins no further job and asks those under way to save and end."""
        self.stopping.set()
        with self._lock:
            for child in self._children:
                with contextlib.suppress(ProcessLookupError):
                    child.send_signal(STOP)

    def run_all(self, jobs: Sequence[Job], parallel: int) -> None:
        """Runs jobs, so many at a time; a job that fails leaves the others alone."""
        futures: dict[Job, Future[None]] = {}
        total, began = len(jobs), time.monotonic()
        finished = 0

        def work(job: Job) -> None:
            nonlocal finished
            for other in self.config.arms[job.arm].waits_for:  # submitted before this one, so it runs or has ended
                ahead = futures.get(Job(other, job.seed))
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

        with ThreadPoolExecutor(parallel) as pool:
            for job in jobs:
                futures[job] = pool.submit(work, job)
            for future in futures.values():
                future.result()

    def records(self) -> dict[str, dict[int, RunRecord]]:
        """Finished runs by arm and seed, in the config's order of arms."""
        found: dict[str, dict[int, RunRecord]] = {arm: {} for arm in self.config.arms}
        for (arm, seed), folder in sorted(self.folders.items(), key=lambda item: item[0][1]):
            found[arm][seed] = read_run(folder)
        return found


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


def default_parallel(config: EsperConfig) -> int:
    """Jobs that fit beside each other: on the cores that this process may use, or on this machine's GPUs."""
    if config.world.device == Device.GPU:
        return max(1, torch.cuda.device_count() // config.world.nproc_per_node)
    return max(1, len(os.sched_getaffinity(0)) // (config.world.nproc_per_node * config.world.threads))


def run_compare(
    name: str, config: CompareConfig, out: Path, *, parallel: int | None, report_only: bool, say: Any
) -> tuple[Comparison, dict[str, dict[int, RunRecord]]]:
    """Runs what is missing and puts everything side by side.

    Args:
        out: folder for runs and report. parallel: jobs at a time, None for as many as fit.
        report_only: run nothing; compare what has finished. say: takes a line of progress.

    Raises:
        Preempted: it was stopped; the same command goes on. EsperError: nothing has finished.
    """
    comparer = Comparer(config, out, say)
    jobs = jobs_of(config)
    if report_only:
        _find(comparer, jobs)
    else:
        first, _ = derive(config, config.in_order()[0], config.seeds[0], {})
        with stopped_by_signals(comparer):
            comparer.run_all(jobs, parallel or default_parallel(first))
    if comparer.stopping.is_set():
        left = len(jobs) - len(comparer.folders) - len(comparer.failures)
        raise Preempted(f"stopped with {left} of {len(jobs)} runs left; the same command goes on")
    runs = comparer.records()
    if not any(runs.values()):
        text = next(iter(comparer.failures.values()), "no run has finished")
        raise EsperError(f"compare {name}: nothing to compare: {text}")
    sizes = [arm for arm, entry in config.arms.items() if entry.size]
    found = compare(name, runs, config.metric, sizes=sizes, subject=config.subject, flops_share=config.flops_share)
    where = {f"{arm}/{seed}": str(folder) for (arm, seed), folder in sorted(comparer.folders.items())}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "compare.json", {"name": name, "runs": where, "failures": _failed(comparer)})
    return found, runs


def _failed(comparer: Comparer) -> dict[str, str]:
    return {f"{arm}/{seed}": text for (arm, seed), text in sorted(comparer.failures.items())}


def _find(comparer: Comparer, jobs: Sequence[Job]) -> None:
    """Takes up the runs that have finished, without starting any."""
    for job in jobs:
        arm = comparer.config.arms[job.arm]
        if not all((other, job.seed) in comparer.folders for other in arm.waits_for):
            continue
        before = {other: comparer.folders[other, job.seed] for other in arm.waits_for}
        _, plain = derive(comparer.config, job.arm, job.seed, before)
        folder = run_folder(comparer.out, plain)
        with contextlib.suppress(RunDirError):
            if comparer.done(folder):
                comparer.folders[job.arm, job.seed] = folder
