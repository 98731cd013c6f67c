"""Starts a run and returns its result."""

import contextlib
import os
import shlex
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.accord.breaker import BreakerOrder
from esper.config.tree import EsperConfig
from esper.config.trust import trust_variable
from esper.launcher.ahead.process import Ahead
from esper.launcher.ahead.torchrun import agent_command, rendezvous_of, torchrun_arguments, torchrun_environment
from esper.launcher.preflight import check_data, check_teacher
from esper.launcher.slurm import FROM_SLURM, TimeLimit, check_single_task, explain_stop, find_job, srun_command
from esper.launcher.supervise import Ended, supervise
from esper.launcher.unsaved import NothingUnsaved
from esper.leyline.errors import ConfigError, EsperError, LeaseError, Preempted, RunDirError
from esper.leyline.files import RunDir, package_folder, write_json
from esper.run.attempt import BEFORE, find_takeover, latest_attempt
from esper.run.directory import check_run, hold_run, read_status, write_order
from esper.run.environment import STARTED
from esper.run.extension import describe_extension
from esper.run.fitting.asking import ask_whether_parts_fit
from esper.run.lock import LOCKED, name_launch
from esper.tolaria.checkpoint.store import CheckpointStore

_FARTHER_S = 10.0  # longer than the supervisors on the hosts wait, which use force first


@dataclass(frozen=True, slots=True)
class LaunchResult:
    """The result of a launch.

    Fields:
        code: exit code, see `esper.leyline.errors`.
        line: one line for a person to read.
        objective: the number that a sweep optimises; None if the run did not finish.
    """

    code: int
    line: str
    objective: float | None = None


def _check_folder() -> None:
    """Refuses a current folder that holds another esper, which ``python -m`` would import in the workers."""
    here, ours = Path.cwd() / "esper", package_folder()
    if (here / "__init__.py").is_file() and not here.samefile(ours):
        raise ConfigError(
            f"{here}: workers started here would run this esper instead of {ours}; change to another folder"
        )


def start(
    config: EsperConfig,
    plain: dict[str, Any],
    launch: str = "run",
    order: BreakerOrder | None = None,
    ahead: Ahead | None = None,
) -> LaunchResult:
    """Runs one run to its end (or prepares it, or prints what it would do).

    Args:
        config: the settings.
        plain: the same settings as plain data.
        launch: "run", "prepare" (everything but the start) or "plan" (nothing is written).
        order: obeyed by the run when it goes on; written once nothing else can refuse the start.
        ahead: the process that was started to be torchrun's agent; without one it is started when it is needed.

    Raises:
        EsperError: the run could not be started.
    """
    _check_folder()
    if launch == "run":
        check_single_task()
    folder = Path(config.run.dir).expanduser().absolute()
    config.run.dir = plain["run"]["dir"] = str(folder)
    if getattr(config.data, "root", None) is not None:  # so that a resume from another folder finds it
        config.data.root = plain["data"]["root"] = str(Path(config.data.root).expanduser().absolute())
    policy = getattr(config.controller, "checkpoint", None)
    if policy is not None:
        config.controller.checkpoint = plain["controller"]["checkpoint"] = str(Path(policy).expanduser().absolute())
    if config.distill.run is not None:
        config.distill.run = plain["distill"]["run"] = str(Path(config.distill.run).expanduser().absolute())
    in_slurm = config.world.rdzv_endpoint == FROM_SLURM
    job = find_job(config.world) if in_slurm and launch == "run" else None
    if job is not None and len(job.hosts) == 1:
        job = None  # there is no other machine to start ranks on
    arguments = torchrun_arguments(config.world, RunDir(folder).config)
    environment = torchrun_environment(config.world, config.trainer) | trust_variable(plain)
    command_line = " ".join(
        [*(f"{key}={value}" for key, value in environment.items()), "torchrun", shlex.join(arguments)]
    )
    check_data(config.data)
    check_teacher(config)
    if launch != "plan":
        ask_whether_parts_fit(plain, environment, folder, ahead)
    if launch == "plan":
        from esper.run.fitting.forecast import describe_memory  # it loads torch, which no other launch needs

        known = check_run(config.run, plain)
        print(f"run directory: {folder} ({'resumed' if known else 'new'})\n{command_line}\n{describe_memory(config)}")
        return LaunchResult(0, "planned")
    longer = describe_extension(config, plain, read_status)
    with hold_run(config.run, plain) as lock:
        if longer:
            print(f"esper: {folder}: {longer}", flush=True)
        if launch == "prepare":
            print(f"run directory: {folder}\n{command_line}")
            return LaunchResult(0, "prepared")
        status, mark = read_status(folder)
        if status is not None and status["status"] == "done":
            if order is not None:
                raise ConfigError(f"--breaker: the run in {folder} is done, so nothing of it can grow any more")
            return _result_of(folder, status, judged=config.governor.enabled)
        command = agent_command(arguments) if job is None else srun_command(job, RunDir(folder).config)
        if config.world.nnodes > 1 and job is None:
            print(
                f"esper: waiting for {config.world.nnodes} hosts; type on each of the others:\n{command_line}",
                flush=True,
            )
        ranks = config.world.nnodes * config.world.nproc_per_node
        print(f"esper: starting {ranks} {'rank' if ranks == 1 else 'ranks'} in {folder}", flush=True)
        limit = TimeLimit(os.environ["SLURM_JOB_ID"], config.world.grace_s) if in_slurm else lambda: None
        grace_s = config.world.grace_s + (_FARTHER_S if job else 0.0)
        before, _ = latest_attempt(folder)
        environment[BEFORE] = str(before)
        if order is not None:
            write_order(folder, order)
        rendezvous = rendezvous_of(arguments) if job is None else job.rendezvous
        name_launch(lock, rendezvous)
        environment[LOCKED] = str(folder)
        ready = None
        if ahead is not None:
            ahead.phases.end("prepare")
            environment[STARTED] = ahead.phases.to_text()
            if job is None:
                ready = ahead.take(environment)
            ahead.dismiss()  # with several machines each has its own
        ended = supervise(
            command,
            environment,
            grace_s=grace_s,
            lock=lock,
            ready=ready,
            stop_due=limit,
            nothing_unsaved=NothingUnsaved(folder),
            remote=job is not None,
        )
        if (other := find_takeover(folder, before, rendezvous)) is not None:
            raise LeaseError(f"{folder}: attempt {other} was begun by another launcher; this run is that one's now")
        status, mark_now = read_status(folder)
        if status is None or mark_now == mark or status["status"] not in ("done", "preempted", "failed", "diverged"):
            status = status_of_silent(ended, saved=bool(CheckpointStore.of_run(folder).signs()))
            write_status(folder, {**status, "attempt": latest_attempt(folder)[0]})
        elif status["status"] == "preempted" and ended.stopped is not None:
            status |= {"reason": explain_stop(ended.stopped) if in_slurm else ended.stopped}
            write_status(folder, status)
        return _result_of(folder, status, judged=config.governor.enabled)


def write_status(folder: Path, status: dict[str, Any]) -> None:
    """Writes RUN/STATUS.json in the launcher's name.

    Raises:
        RunDirError: it cannot be written; most likely the workers could not write either.
    """
    try:
        write_json(RunDir(folder).status, status)
    except OSError as error:
        raise RunDirError(
            f"{RunDir(folder).status}: cannot be written ({error.strerror}); how the run ended stands above; see to "
            f"the disk, then: esper resume {shlex.quote(str(folder))}"
        ) from None


def status_of_silent(ended: Ended, *, saved: bool) -> dict[str, Any]:
    """The status of a run whose workers ended without writing one.

    Args:
        ended: how they did.
        saved: whether the run has a checkpoint.
    """
    common = {"step": None, "objective": None, "written_by": "launcher"}
    if ended.stopped is not None:
        left = "the last checkpoint stands" if saved else "there is no checkpoint yet, so it will begin anew"
        text = f"{ended.stopped}: ended before the workers could save; {left}"
        return {"status": "preempted", "exit_code": Preempted.exit_code, "message": text, **common}
    text = f"the workers ended without a word (torchrun's exit code was {ended.returncode}); the reason stands above"
    return {"status": "failed", "exit_code": EsperError.exit_code, "message": text, **common}


def _result_of(folder: Path, status: dict[str, Any], *, judged: bool = True) -> LaunchResult:
    """The result that a status means, with the command that goes on with the run.

    Args:
        folder: the run directory.
        status: how the run ended.
        judged: whether it has a governor.
    """
    kind, code, objective = status["status"], status.get("exit_code"), status.get("objective")
    if kind == "done":
        code = 0
    elif not isinstance(code, int) or code == 0:
        code = {"preempted": Preempted.exit_code, "diverged": 79}.get(kind, EsperError.exit_code)
    step = "" if status.get("step") is None else f" at step {status['step']}"
    message = f": {status['message']}" if status.get("message") else ""
    message += f" ({status['reason']})" if status.get("reason") else ""
    again = "" if kind == "done" else f"; to go on: esper resume {shlex.quote(str(folder))}"
    if kind == "diverged":
        again = _way_out(folder, judged=judged)
    if code == ConfigError.exit_code:  # the wrong setting is in config.yaml, which is read-only
        again = "; correct the setting and start again with another run.dir"
    return LaunchResult(code, f"{kind}{step}{message} (run directory: {folder}){again}", objective)


def _way_out(folder: Path, *, judged: bool) -> str:
    """What to do about a run that diverged: it would do so again, since every step of it would be the same."""
    run, steps = shlex.quote(str(folder)), sorted(CheckpointStore.of_run(folder).steps())
    off = " governor.enabled=false" if judged else ""
    ways = [f"esper resume {run}{off} goes on without a judge"] if off and steps else []
    if steps:
        ways.append(f"esper resume {run} --at {steps[0]} --as NEW{off} goes on from an earlier checkpoint")
    ways.append("a new run (run.dir=NEW) with a lower optim.lr, or other data, begins anew")
    return f"; resumed as it is it would end so again; {'; '.join(ways)}"


def _print_lines(result: LaunchResult, stream: Any) -> None:
    for text in result.line.splitlines():
        print(f"esper: {text}", file=stream, flush=True)


def show_result(result: LaunchResult) -> None:
    """Prints a result: on stdout if all is well, else as the last lines on stderr."""
    if result.line not in ("planned", "prepared"):
        _print_lines(result, sys.stdout if result.code == 0 else sys.stderr)


@contextlib.contextmanager
def results_of_errors(results: list[LaunchResult]) -> Iterator[None]:
    """Appends the result of an exception that the block raises; only a bug shows its traceback."""
    try:
        yield
    except EsperError as error:
        kind = "config" if isinstance(error, ConfigError) else type(error).__name__.removesuffix("Error").lower()
        prefix = "" if type(error) is EsperError else f"{kind}: "  # the printed line begins with "esper:" in any case
        results.append(LaunchResult(error.exit_code, "\n".join(prefix + line for line in str(error).splitlines())))
    except OSError as error:
        results.append(LaunchResult(74, f"{error.filename or 'input/output'}: {error.strerror or error}"))
    except Exception as error:
        traceback.print_exc()
        results.append(LaunchResult(EsperError.exit_code, f"a bug in esper: {type(error).__name__}: {error}"))
