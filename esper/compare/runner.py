"""``esper compare NAME``: arms x seeds, run where they have not been run yet, then one table and one page.

A run lies in OUT/runs/<digest of its config>: whatever stops the command, the same command goes on, finished runs are
never repeated, and a changed arm is a new run. A run on other data than those at hand is refused by name. Jobs are
separate processes (each its own launcher and torchrun), as many at a time as asked for, each on GPUs of its own where
it wants some. Machines or an array of Slurm tasks share the work by ``--share I/N`` (each takes every N-th seed);
afterwards ``--report`` puts together what lies in OUT. What is missing or failed is said beneath the table.
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

from esper.compare.arms import CompareConfig, DataOnce, derive, read_result
from esper.compare.devices import Devices, default_parallel, on_gpu, visible_gpus
from esper.config.tree import EsperConfig, build_config, config_digest
from esper.karn.comparison import Comparison, compare
from esper.karn.runs import RunRecord, read_run
from esper.launcher.supervise import torchrun_environment
from esper.leyline.errors import EsperError, Preempted, RunDirError, one_line
from esper.leyline.files import RunDir, write_json
from esper.run.directory import held_run, read_status

QUIET = {"console": "off", "level": "full"}
SHOWN = 8  # of a list of missing runs
STOP = signal.SIGUSR1  # workers and launchers take it as often as it comes; a second SIGTERM would end them unsaved


@dataclass(frozen=True, slots=True)
class ArmJob:
    """One run of one arm."""

    arm: str
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonReport:
    """What a command came to.

    Fields:
        found: the comparison. runs: what it was made of, by arm and seed. where: run folder by "arm/seed".
        failures: what a run that failed or cannot be read said, by "arm/seed".
    """

    found: Comparison
    runs: dict[str, dict[int, RunRecord]]
    where: dict[str, str]
    failures: dict[str, str]


class Stopped(Exception):
    """A job was not begun because the command is being stopped."""


def jobs_of(config: CompareConfig) -> list[ArmJob]:
    """Every run of a comparison: seed by seed, arms that others wait for first."""
    return [ArmJob(arm, seed) for seed in config.seeds for arm in config.in_order()]


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
        self.data = DataOnce()
        self._gpus = Devices(visible_gpus())
        self._running: dict[Path, threading.Lock] = {}  # two arms may come to the same config
        self.folders: dict[tuple[str, int], Path] = {}
        self.failures: dict[tuple[str, int], str] = {}
        self.stopping = threading.Event()
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock, self._deriving = threading.Lock(), threading.Lock()

    def done(self, folder: Path, config: EsperConfig) -> bool:
        """Whether a run has finished on the data at hand.

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
        if self.stopping.is_set():
            raise Stopped
        plain["run"] |= {"dir": str(folder), "resume": "auto", "name": f"{job.arm}-{job.seed}", "group": "compare"}
        plain["telemetry"] |= QUIET
        config = build_config(plain)
        log = folder / "console.log"
        alone = config.world.nproc_per_node * config.world.nnodes == 1
        with contextlib.ExitStack() as held, contextlib.ExitStack() as lock:
            lock.enter_context(held_run(config.run, plain))
            if self.done(folder, config):  # another command on the same folder was faster
                return
            gpus = held.enter_context(self._gpus.take(config.world.nproc_per_node if on_gpu(config) else 0))
            if alone:  # one rank needs no torchrun: its worker runs under our lock
                command = [sys.executable, "-m", "esper.worker", str(RunDir(folder).config)]
            else:
                lock.close()  # the launcher of the run takes the lock itself
                command = [sys.executable, "-m", "esper.cli", "resume", str(folder)]
            code = self._wait(command, log, {**torchrun_environment(config.world, config.trainer), **gpus})
        done, stopped = self.done(folder, config), self.stopping.is_set()
        if stopped and not done:
            raise Stopped
        if not done or (code and not stopped):  # a stop may strike a run that is done, on its way out
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no output"]
            raise EsperError(f"{last[0]} (its output: {log})")

    def _wait(self, command: list[str], log: Path, environment: dict[str, str]) -> int:
        with log.open("ab") as stream:
            child = subprocess.Popen(
                command,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **environment},
            )
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

    def run_all(self, jobs: Sequence[ArmJob], parallel: int) -> None:
        """Runs jobs, so many at a time; a job that fails leaves the others alone."""
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

        with ThreadPoolExecutor(parallel) as pool:
            for job in jobs:
                futures[job] = pool.submit(work, job)
            for future in futures.values():
                future.result()

    def records(self) -> dict[str, dict[int, RunRecord]]:
        """Finished runs by arm and seed, in the config's order of arms."""
        found: dict[str, dict[int, RunRecord]] = {arm: {} for arm in self.config.arms}
        for (arm, seed), folder in sorted(self.folders.items(), key=lambda item: item[0][1]):
            try:
                found[arm][seed] = read_run(folder)
            except RunDirError as error:
                self.failures[arm, seed] = one_line(error)
        return found

    def notes(self, runs: dict[str, dict[int, RunRecord]]) -> list[str]:
        """What a reader must know beside the numbers: which runs are missing, and whether the code is one."""
        jobs = jobs_of(self.config)
        missing = [f"{job.arm} {job.seed}" for job in jobs if job.seed not in runs[job.arm]]
        notes = []
        if missing:
            shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
            notes.append(f"{len(missing)} of {len(jobs)} runs are missing, rows stand on the others: {shown}")
        notes += [f"{key} failed: {text}" for key, text in self.failed().items()]
        codes = {read_result(Path(run.folder)).get("code") for by_seed in runs.values() for run in by_seed.values()}
        if len(codes) > 1:
            notes.append(
                f"runs of {len(codes)} versions of esper's code stand beside each other; remove {self.out / 'runs'} to "
                "run all of them anew"
            )
        return notes

    def failed(self) -> dict[str, str]:
        """What went wrong, by "arm/seed"."""
        return {f"{arm}/{seed}": text for (arm, seed), text in sorted(self.failures.items())}


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


def run_compare(
    name: str,
    config: CompareConfig,
    out: Path,
    *,
    parallel: int | None,
    report_only: bool,
    share: str | None = None,
    say: Any,
) -> ComparisonReport:
    """Runs what is missing and puts everything side by side.

    Args:
        out: folder for runs and report. parallel: jobs at a time, None for as many as fit.
        report_only: run nothing; compare what has finished. share: "I/N" where ``config`` holds a part of the seeds:
            OUT/compare.json, which is of the whole, is then left alone. say: takes a line of progress.

    Raises:
        Preempted: it was stopped; the same command goes on. EsperError: nothing has finished.
        DataError: the data are not there; nothing was begun.
    """
    comparer = Comparer(config, out, say)
    jobs = jobs_of(config)
    first, _ = derive(config, config.in_order()[0], config.seeds[0], {}, comparer.data)
    comparer.data(first.data)  # before any run is made
    if report_only:
        _find(comparer, jobs)
    else:
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
    found = compare(
        name,
        runs,
        config.metric,
        sizes=sizes,
        subject=config.subject,
        flops_share=config.flops_share,
        notes=comparer.notes(runs),
    )
    where = {f"{arm}/{seed}": run.folder for arm, by_seed in sorted(runs.items()) for seed, run in by_seed.items()}
    if share is None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "compare.json", {"name": name, "runs": where, "failures": comparer.failed()})
    return ComparisonReport(found=found, runs=runs, where=where, failures=comparer.failed())


def _find(comparer: Comparer, jobs: Sequence[ArmJob]) -> None:
    """Takes up the runs that have finished, without starting any; one that has failed is noted."""
    for job in jobs:
        arm = comparer.config.arms[job.arm]
        if not all((other, job.seed) in comparer.folders for other in arm.waits_for):
            continue
        before = {other: comparer.folders[other, job.seed] for other in arm.waits_for}
        try:
            config, plain = derive(comparer.config, job.arm, job.seed, before, comparer.data)
            folder = run_folder(comparer.out, plain)
            if comparer.done(folder, config):
                comparer.folders[job.arm, job.seed] = folder
                continue
            status, _ = read_status(folder)
        except EsperError as error:
            comparer.failures[job.arm, job.seed] = one_line(error)
            continue
        if status is not None and status["status"] != "preempted":
            comparer.failures[job.arm, job.seed] = f"{status['status']}: {status.get('message', '')} ({folder})"
