"""From a command line to a finished run: compose once with Hydra, check everything, start torchrun, tell how it ended.

    compose -> plain data -> every problem at once -> RUN made and locked -> config.yaml -> torchrun -> STATUS.json

Hydra lives here and nowhere else: workers read RUN/config.yaml. How a run ended is what rank 0 wrote into
RUN/STATUS.json, never torchrun's exit code. One run returns its objective to a sweep; a job of a sweep that fails
raises inside its Hydra job, so that the sweep goes on, and the gravest code is the command's own; a preempted one
stops the sweep, which the same command continues (finished jobs are not run again).
"""

import contextlib
import difflib
import io
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from esper.attempt import BEFORE, latest_attempt, taken_over
from esper.config import EsperConfig, build_config
from esper.leyline.errors import ConfigError, EsperError, LeaseError, Preempted, RunDirError
from esper.preflight import check_data
from esper.rundir import CONFIG, STATUS, check_run, held_run, read_status, write_json, write_order
from esper.slurm import FROM_SLURM, TimeLimit, srun_command, this_job, why
from esper.supervise import Ended, agent_command, rendezvous_of, supervise, torchrun_arguments, torchrun_environment
from esper.tolaria.breaker import BreakerOrder

LAUNCHES = ("run", "prepare", "plan")
_FARTHER_S = 10.0  # the supervisors on the hosts use force first
_BY_GRAVITY = (0, 75, 78, 74, 79, 76, 70)  # exit codes, the gravest last
_HYDRA_HINT = "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a run ended.

    Args:
        code: exit code, see `esper.leyline.errors`.
        line: one line for a person.
        objective: what a sweep optimises; None when the run did not finish.
    """

    code: int
    line: str
    objective: float | None = None


class _JobFailed(Exception):
    """Tells Hydra's sweeper that a job failed, in words that were shown where it ran, and with which exit code."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line, code)  # both, since it may come back pickled
        self.line, self.code = line, code


class _Words:
    """Where a job's last words go: stderr as it was before Hydra's own was caught. A job that a launcher plugin sends
    away is pickled; where it is unpickled they go to that process's own stderr."""

    def __init__(self, stream: Any = None) -> None:
        self.away, self.stream = stream is None, stream or sys.stderr

    def __reduce__(self) -> tuple[type["_Words"], tuple[()]]:
        return _Words, ()


class _StopSweep(BaseException):
    """Passes through Hydra, which catches only Exception in a job."""


def conf_folder() -> Path:
    """Hydra's groups: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return folder
    raise EsperError(f"{package}: no conf/config.yaml in it or beside it; install the project anew")


def plain_of(composed: DictConfig) -> dict[str, Any]:
    """Resolved plain data of what Hydra composed.

    Raises:
        ConfigError: values that are missing (``???``), all of them, or one that cannot be resolved.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError([f"{key} = ???: missing; set {key}=<value>" for key in missing])
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key, text = error.full_key or "config", str(error).splitlines()[0]
        raise ConfigError(f"{key}: {text}; set {key}=<value>") from None
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def look_here() -> None:
    """Makes modules of the current folder importable for the checks, as ``python -m`` makes them for the workers."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _check_folder() -> None:
    here, ours = Path.cwd() / "esper", Path(__file__).resolve().parent
    if (here / "__init__.py").is_file() and not here.samefile(ours):
        raise ConfigError(
            f"{here}: workers started here would run this esper instead of {ours}; change to another folder"
        )


def start(config: EsperConfig, plain: dict[str, Any], how: str = "run", order: BreakerOrder | None = None) -> Outcome:
    """Runs one run to its end (or prepares it, or tells what it would do).

    Args:
        config, plain: the same settings twice.
        how: run, prepare (all but the start) or plan (nothing is written).
        order: for the run to obey where it goes on; written once nothing else can refuse the start.

    Raises:
        EsperError: the run could not be started.
    """
    _check_folder()
    folder = Path(config.run.dir).expanduser().absolute()
    config.run.dir = plain["run"]["dir"] = str(folder)
    if getattr(config.data, "root", None) is not None:  # resumed from another folder, it must still be found
        config.data.root = plain["data"]["root"] = str(Path(config.data.root).expanduser().absolute())
    if config.distill.run is not None:
        config.distill.run = plain["distill"]["run"] = str(Path(config.distill.run).expanduser().absolute())
    in_slurm = config.world.rdzv_endpoint == FROM_SLURM
    job = this_job(config.world) if in_slurm and how == "run" else None
    if job is not None and len(job.hosts) == 1:
        job = None  # nobody to start elsewhere
    arguments = torchrun_arguments(config.world, folder / CONFIG)
    environment = torchrun_environment(config.world, config.trainer)
    typed = " ".join([*(f"{key}={value}" for key, value in environment.items()), "torchrun", shlex.join(arguments)])
    check_data(config.data)
    if how == "plan":
        known = check_run(config.run, plain)
        print(f"run directory: {folder} ({'resumed' if known else 'new'})\n{typed}")
        return Outcome(0, "planned")
    with held_run(config.run, plain) as lock:
        if how == "prepare":
            print(f"run directory: {folder}\n{typed}")
            return Outcome(0, "prepared")
        status, mark = read_status(folder)
        if status is not None and status["status"] == "done":
            if order is not None:
                raise ConfigError(f"--breaker: the run in {folder} is done, so nothing of it can grow any more")
            return _outcome(folder, status)
        command = agent_command(arguments) if job is None else srun_command(job, folder / CONFIG)
        if config.world.nnodes > 1 and job is None:
            print(f"esper: waiting for {config.world.nnodes} hosts; type on each of the others:\n{typed}", flush=True)
        ranks = config.world.nnodes * config.world.nproc_per_node
        print(f"esper: starting {ranks} {'rank' if ranks == 1 else 'ranks'} in {folder}", flush=True)
        limit = TimeLimit(os.environ["SLURM_JOB_ID"], config.world.grace_s) if in_slurm else lambda: None
        grace_s = config.world.grace_s + (_FARTHER_S if job else 0.0)
        before, _ = latest_attempt(folder)
        environment[BEFORE] = str(before)
        if order is not None:
            write_order(folder, order)
        ended = supervise(command, environment, grace_s=grace_s, lock=lock, stop_due=limit, remote=job is not None)
        launch = rendezvous_of(arguments) if job is None else job.rendezvous
        if (other := taken_over(folder, before, launch)) is not None:
            raise LeaseError(f"{folder}: attempt {other} was begun by another launcher; this run is that one's now")
        status, mark_now = read_status(folder)
        if status is None or mark_now == mark or status["status"] not in ("done", "preempted", "failed", "diverged"):
            status = _status_of_silent(ended)
            _write_status(folder, status)
        elif status["status"] == "preempted" and ended.stopped is not None:
            status |= {"reason": why(ended.stopped) if in_slurm else ended.stopped}
            _write_status(folder, status)
        return _outcome(folder, status)


def _write_status(folder: Path, status: dict[str, Any]) -> None:
    """How the run ended, in the launcher's words.

    Raises:
        RunDirError: it cannot be written, and then most likely the workers could not write either.
    """
    try:
        write_json(folder / STATUS, status)
    except OSError as error:
        raise RunDirError(
            f"{folder / STATUS}: cannot be written ({error.strerror}); how the run ended stands above; see to the "
            f"disk, then: esper resume {shlex.quote(str(folder))}"
        ) from None


def _status_of_silent(ended: Ended) -> dict[str, Any]:
    """The status of workers that ended without writing one."""
    common = {"step": None, "objective": None, "written_by": "launcher"}
    if ended.stopped is not None:
        text = f"{ended.stopped}: ended before the workers could save; the last checkpoint stands"
        return {"status": "preempted", "exit_code": Preempted.exit_code, "message": text, **common}
    text = f"the workers ended without a word (torchrun's exit code was {ended.returncode}); the reason stands above"
    return {"status": "failed", "exit_code": EsperError.exit_code, "message": text, **common}


def _outcome(folder: Path, status: dict[str, Any]) -> Outcome:
    kind, code, objective = status["status"], status.get("exit_code"), status.get("objective")
    if kind == "done":
        code = 0
    elif not isinstance(code, int) or code == 0:
        code = {"preempted": Preempted.exit_code, "diverged": 79}.get(kind, EsperError.exit_code)
    step = "" if status.get("step") is None else f" at step {status['step']}"
    message = f": {status['message']}" if status.get("message") else ""
    message += f" ({status['reason']})" if status.get("reason") else ""
    again = "" if kind == "done" else f"; to go on: esper resume {shlex.quote(str(folder))}"
    if code == ConfigError.exit_code:  # config.yaml is read-only and what is wrong stands in it
        again = "; correct the setting and start again with another run.dir"
    return Outcome(code, f"{kind}{step}{message} (run directory: {folder}){again}", objective)


def _say(outcome: Outcome, stream: Any) -> None:
    for text in outcome.line.splitlines():
        print(f"esper: {text}", file=stream, flush=True)


def report(outcome: Outcome) -> None:
    """Shows an outcome: on stdout when all is well, else as the last words on stderr."""
    if outcome.line not in ("planned", "prepared"):
        _say(outcome, sys.stdout if outcome.code == 0 else sys.stderr)


@contextlib.contextmanager
def outcomes_of_errors(outcomes: list[Outcome]) -> Iterator[None]:
    """Turns an exception into an outcome; only a bug shows its traceback."""
    try:
        yield
    except EsperError as error:
        kind = "config" if isinstance(error, ConfigError) else type(error).__name__.removesuffix("Error").lower()
        prefix = "" if type(error) is EsperError else f"{kind}: "  # the printed line begins with esper as it is
        outcomes.append(Outcome(error.exit_code, "\n".join(prefix + line for line in str(error).splitlines())))
    except OSError as error:
        outcomes.append(Outcome(74, f"{error.filename or 'input/output'}: {error.strerror or error}"))
    except Exception as error:
        traceback.print_exc()
        outcomes.append(Outcome(EsperError.exit_code, f"a bug in esper: {type(error).__name__}: {error}"))


def _job(composed: DictConfig) -> Outcome:
    """One Hydra job."""
    plain = plain_of(composed)
    how = plain.pop("launch", None)
    if how not in LAUNCHES:
        raise ConfigError(f"launch = {how!r}: expected one of {', '.join(LAUNCHES)}; for example launch=run")
    context = HydraConfig.get()
    if context.mode is RunMode.MULTIRUN:
        if any(override.lstrip("+").startswith("run.dir=") for override in context.overrides.task):
            raise ConfigError("run.dir: in a multirun each job has a folder of its own; set hydra.sweep.dir instead")
        plain["run"]["dir"] = context.runtime.output_dir
    return start(build_config(plain), plain, how)


def _in_a_line(text: str) -> str:
    """Hydra's commonest complaints in our words: where, what, what to do; others as Hydra has them."""
    override = re.search(r"Could not override '([^']+)'", text)
    if override:
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            tree = compose("config")
        keys = _dotted(OmegaConf.to_container(tree, resolve=False))
        if override[1] in keys:  # a mapping that has no such key, or a group's name for a setting
            return f"esper: config: {override[1]}: cannot take this value; see --cfg job for what stands there"
        near = difflib.get_close_matches(override[1], keys, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(near)}" if near else "see --cfg job for all of them"
        return f"esper: config: {override[1]}: no such setting; {hint}"
    option = re.search(
        r"Could not find '([\w/]+)/([^']+)'.*?Available options in '[^']+':\n((?:\t\S+\n?)+)", text, re.S
    )
    if option:
        return f"esper: config: {option[1]}={option[2]}: no such option; there are {', '.join(option[3].split())}"
    return text


def _dotted(plain: Any, path: str = "") -> list[str]:
    if not isinstance(plain, dict):
        return [path]
    found = [path] if path else []
    for key, value in plain.items():
        found += _dotted(value, f"{path}.{key}" if path else str(key))
    return found


def _gravity(code: int) -> int:
    return _BY_GRAVITY.index(code) if code in _BY_GRAVITY else len(_BY_GRAVITY)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; returns its exit code."""
    look_here()
    arguments = list(sys.argv[1:] if argv is None else argv)
    outcomes: list[Outcome] = []
    words, before = _Words(sys.stderr), sys.argv

    def job(composed: DictConfig) -> float | None:
        outcome: list[Outcome] = []
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        with contextlib.redirect_stderr(words.stream):
            with outcomes_of_errors(outcome):
                outcome.append(_job(composed))
            outcomes.append(outcome[0])
            report(outcome[0])
        if sweep and outcome[0].code == Preempted.exit_code and not words.away:
            raise _StopSweep
        if sweep and outcome[0].code != 0:
            with contextlib.suppress(OSError):  # Hydra made it; a job that was refused leaves nothing in it
                Path(HydraConfig.get().runtime.output_dir).rmdir()
            raise _JobFailed(outcome[0].line, outcome[0].code)
        return outcome[0].objective

    app = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)
    caught = io.StringIO()  # Hydra's own complaints; it would report a failed job of ours a second time, as a traceback
    code = 0
    try:
        sys.argv = [before[0], *arguments]
        with contextlib.redirect_stderr(caught):
            app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if not outcomes and isinstance(end.__context__, _JobFailed):  # it ran elsewhere
            outcomes.append(Outcome(end.__context__.code, end.__context__.line))
            report(outcomes[-1])
    except (_StopSweep, _JobFailed):
        pass
    except KeyboardInterrupt:
        outcomes.append(Outcome(Preempted.exit_code, "interrupted before a run had started"))
        report(outcomes[-1])
    finally:
        sys.argv = before
    failed = [outcome for outcome in outcomes if outcome.code != 0]
    if not failed:
        text = caught.getvalue().replace(_HYDRA_HINT, "")
        if text.strip():
            print(_in_a_line(text.strip()), file=words.stream, flush=True)
        return ConfigError.exit_code if code else 0
    if len(outcomes) > 1:
        print(
            f"esper: {len(failed)} of {len(outcomes)} jobs did not finish; their lines stand above", file=words.stream
        )
    return max((outcome.code for outcome in failed), key=_gravity)


if __name__ == "__main__":
    sys.exit(main())
