"""``esper compare NAME``: runs arms x seeds where they have not been run yet, then collects one report.

Machines or the tasks of a Slurm array share the work by ``--share I/N`` (each takes every N-th seed); afterwards
``--report`` collects what lies in OUT. Runs that are missing or failed are listed beneath the table. Making the runs is
the work of `esper.compare.runner`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from esper.compare.arms import CompareConfig, derive, read_result
from esper.compare.devices import default_parallel
from esper.compare.runner import ArmJob, Comparer, jobs_of, run_folder, stopped_by_signals
from esper.karn.comparison import Comparison, compare
from esper.karn.rows import Runs, find_metric, metric_of_runs
from esper.karn.runs import RunRecord, read_run
from esper.leyline.errors import EsperError, Preempted, RunDirError, one_line
from esper.leyline.files import write_json
from esper.run.directory import read_status
from esper.tolaria.tasks.bind import bind

SHOWN = 8  # of a list of missing runs


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonReport:
    """The result of the command.

    Fields:
        comparison: the arms side by side.
        runs: the records that it is made of, by arm and seed.
        where: the folder of each run, by "arm/seed".
        failures: the error of each run that failed or cannot be read, by "arm/seed".
    """

    comparison: Comparison
    runs: dict[str, dict[int, RunRecord]]
    where: dict[str, str]
    failures: dict[str, str]


def run_compare(
    name: str,
    config: CompareConfig,
    out: Path,
    *,
    parallel: int | None,
    report_only: bool,
    share: str | None = None,
    say: Callable[[str], None],
) -> ComparisonReport:
    """Runs what is missing and puts all arms side by side.

    Args:
        name: of the comparison.
        config: its arms and seeds.
        out: folder for runs and report.
        parallel: number of jobs at a time; None for as many as fit.
        report_only: runs nothing, compares what has finished.
        share: "I/N" if ``config`` holds only a part of the seeds; OUT/compare.json describes the whole and is then
            not written.
        say: takes a line of progress.

    Raises:
        Preempted: the command was stopped; the same command goes on.
        EsperError: no run has finished.
        DataError: the data are missing; no run was begun.
    """
    comparer = Comparer(config, out, say)
    first, _ = derive(config, config.in_order()[0], config.seeds[0], {}, comparer.data)
    bundle = bind(comparer.data(first.data), first.task)  # raises before any run is made
    find_metric(config.metric, bundle.learns.info())
    runs = finish_runs(comparer, parallel=None if report_only else parallel or default_parallel(first))
    if not any(runs.values()):
        text = next(iter(comparer.failures.values()), "no run has finished")
        raise EsperError(f"compare {name}: nothing to compare: {text}")
    sizes = [arm for arm, entry in config.arms.items() if entry.size]
    comparison = compare(
        name,
        runs,
        metric_of_runs(config.metric, runs),
        sizes=sizes,
        subject=config.subject,
        flops_share=config.flops_share or 0.0,
        margin=config.margin or 0.0,
        notes=make_notes(comparer, runs),
    )
    where = folders_by_name(runs)
    if share is None:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "compare.json", {"name": name, "runs": where, "failures": failures_by_name(comparer)})
    return ComparisonReport(comparison=comparison, runs=runs, where=where, failures=failures_by_name(comparer))


def finish_runs(comparer: Comparer, *, parallel: int | None) -> dict[str, dict[int, RunRecord]]:
    """Runs what is missing of a comparison, and reads what has finished.

    Args:
        comparer: of the comparison.
        parallel: number of jobs at a time; None runs nothing.

    Raises:
        Preempted: the command was stopped; the same command goes on.
    """
    jobs = jobs_of(comparer.config)
    if parallel is None:
        collect_finished(comparer, jobs)
    else:
        with stopped_by_signals(comparer):
            comparer.run_all(jobs, parallel)
    if comparer.stopping.is_set():
        left = len(jobs) - len(comparer.folders) - len(comparer.failures)
        raise Preempted(f"stopped with {left} of {len(jobs)} runs left; the same command goes on")
    return read_records(comparer)


def folders_by_name(runs: Runs) -> dict[str, str]:
    """The folder of each run, by "arm/seed"."""
    return {f"{arm}/{seed}": run.folder for arm, by_seed in sorted(runs.items()) for seed, run in by_seed.items()}


def read_records(comparer: Comparer) -> dict[str, dict[int, RunRecord]]:
    """Reads the finished runs, by arm and seed, in the config's order of arms; an unreadable one becomes a failure."""
    records: dict[str, dict[int, RunRecord]] = {arm: {} for arm in comparer.config.arms}
    for (arm, seed), folder in sorted(comparer.folders.items(), key=lambda item: item[0][1]):
        try:
            records[arm][seed] = read_run(folder)
        except RunDirError as error:
            comparer.failures[arm, seed] = one_line(error)
    return records


def make_notes(comparer: Comparer, runs: dict[str, dict[int, RunRecord]]) -> list[str]:
    """Notes beside the numbers: which runs are missing or failed, and whether all runs had the same code."""
    jobs = jobs_of(comparer.config)
    missing = [f"{job.arm} {job.seed}" for job in jobs if job.seed not in runs[job.arm]]
    notes = []
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        notes.append(f"{len(missing)} of {len(jobs)} runs are missing, rows stand on the others: {shown}")
    notes += [f"{key} failed: {text}" for key, text in failures_by_name(comparer).items()]
    codes = {read_result(Path(run.folder)).get("code") for by_seed in runs.values() for run in by_seed.values()}
    if len(codes) > 1:
        notes.append(
            f"runs of {len(codes)} versions of esper's code stand beside each other; remove {comparer.out / 'runs'} to "
            "run all of them anew"
        )
    return notes


def failures_by_name(comparer: Comparer) -> dict[str, str]:
    """The error of each job that failed, by "arm/seed"."""
    return {f"{arm}/{seed}": text for (arm, seed), text in sorted(comparer.failures.items())}


def collect_finished(comparer: Comparer, jobs: Sequence[ArmJob]) -> None:
    """Finds the runs that have finished, without starting any; notes each one that has failed."""
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
