"""From a command line to a finished run: compose once with Hydra, check everything, start torchrun, report the end.

    compose -> plain data -> every problem at once -> RUN made and locked -> config.yaml -> torchrun -> STATUS.json

Hydra is used in the launcher and nowhere else: workers read RUN/config.yaml. The result of a run is what rank 0 wrote
into RUN/STATUS.json, never torchrun's exit code. A run returns its objective to a sweep. A job of a sweep that fails
raises inside its Hydra job, so that the sweep goes on; the gravest exit code becomes the command's own. A preempted job
stops the sweep, which the same command continues (finished jobs are not run again). What this needs beyond Hydra's
interface is explained in docs/hydra.md.
"""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from esper.config.folder import conf_folder
from esper.launcher.ahead.process import Ahead
from esper.launcher.complaints import reword, words_in_order
from esper.launcher.defaults import store_defaults
from esper.launcher.early import interrupt_on_stop
from esper.launcher.start import LaunchResult, results_of_errors, show_result, start
from esper.leyline.errors import ConfigError, Preempted
from esper.nissa.screen import safe_streams

LAUNCHES = ("run", "prepare", "plan")
Begin = Callable[[dict[str, Any], str, Ahead], LaunchResult]
_BY_GRAVITY = (0, 75, 78, 74, 79, 76, 70)  # exit codes, the gravest last
_HYDRA_HINT = "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."


store_defaults()  # every module that composes imports this one; conf/ alone holds only what differs from the defaults


class _JobFailed(Exception):
    """Reports to Hydra's sweeper that a job failed: the line that was shown where it ran, and its exit code."""

    def __init__(self, line: str, code: int) -> None:
        super().__init__(line, code)  # both, because a launcher plugin may send the error back pickled
        self.line, self.code = line, code


class _JobStderr:
    """The stream for a job's final message: stderr as it was before Hydra's own output was captured.

    A launcher plugin pickles a job and runs it in another process, where this stream cannot go. So it is unpickled as
    that process's own stderr.

    Args:
        stream: stderr of this process; None in a job that runs elsewhere.
    """

    def __init__(self, stream: Any = None) -> None:
        self.elsewhere, self.stream = stream is None, stream or sys.stderr

    def __reduce__(self) -> tuple[type["_JobStderr"], tuple[()]]:
        return _JobStderr, ()


class _StopSweep(BaseException):
    """Ends a sweep. Hydra catches every Exception of a job and goes on, so this is none."""


def plain_of(composed: DictConfig) -> dict[str, Any]:
    """The config that Hydra composed, resolved, as plain data.

    Raises:
        ConfigError: values are missing (``???``; the text names all of them), or one cannot be resolved.
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


def make_cwd_importable() -> None:
    """Makes modules of the current folder importable for the checks, as ``python -m`` makes them for the workers."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def begin_run(plain: dict[str, Any], launch: str, ahead: Ahead) -> LaunchResult:
    """Runs one run; see `start`."""
    if launch == "run":
        ahead.start()  # for a later job of a sweep; for others there is one
    return start(ahead.check(plain), plain, launch, ahead=ahead)


def _job(composed: DictConfig, begin: Begin, ahead: Ahead) -> LaunchResult:
    """Starts the run of one Hydra job."""
    plain = plain_of(composed)
    launch = plain.pop("launch", None)
    if launch not in LAUNCHES:
        raise ConfigError(f"launch = {launch!r}: expected one of {', '.join(LAUNCHES)}; for example launch=run")
    context = HydraConfig.get()
    if context.mode is RunMode.MULTIRUN:
        if any(override.lstrip("+").startswith("run.dir=") for override in context.overrides.task):
            raise ConfigError("run.dir: in a multirun each job has a folder of its own; set hydra.sweep.dir instead")
        plain["run"]["dir"] = context.runtime.output_dir
    name_in_words(plain["run"], context)
    return begin(plain, launch, ahead)


def name_in_words(run: dict[str, Any], context: HydraConf) -> None:
    """Names a run after its experiment, and its group after the sweep, where the settings do not.

    Args:
        run: the section ``run``; changed in place.
        context: of the Hydra job.
    """
    experiment = context.runtime.choices.get("experiment")
    if run["name"] is None and experiment not in (None, "null"):
        run["name"] = str(experiment)
    if run["group"] is None and context.mode is RunMode.MULTIRUN:
        run["group"] = " ".join(Path(str(context.sweep.dir)).parts[-2:])


def _gravity(code: int) -> int:
    """The rank of an exit code among the others; an unknown one is the gravest."""
    return _BY_GRAVITY.index(code) if code in _BY_GRAVITY else len(_BY_GRAVITY)


@safe_streams()
def main(
    argv: Sequence[str] | None = None,
    *,
    root: str = "config",
    begin: Begin = begin_run,
    ahead: Ahead | None = None,
) -> int:
    """Runs a command line; returns its exit code.

    Args:
        argv: its words; those of this process unless given.
        root: name of the file in conf/ that Hydra begins with.
        begin: starts what was composed: (plain settings, launch, the process that was started ahead) -> result.
        ahead: such a process, if the caller has started one already; it is ended with this call.
    """
    make_cwd_importable()
    interrupt_on_stop()
    arguments = list(sys.argv[1:] if argv is None else argv)
    results: list[LaunchResult] = []
    job_stderr, argv_before = _JobStderr(sys.stderr), sys.argv
    ahead = ahead or Ahead()

    def job(composed: DictConfig) -> float | None:
        job_results: list[LaunchResult] = []
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        with contextlib.redirect_stderr(job_stderr.stream):
            with results_of_errors(job_results):
                job_results.append(_job(composed, begin, ahead))
            (result,) = job_results
            results.append(result)
            show_result(result)
        if sweep and result.code == Preempted.exit_code and not job_stderr.elsewhere:
            raise _StopSweep
        if sweep and result.code != 0:
            with contextlib.suppress(OSError):  # Hydra made the folder; a job that was refused left it empty
                Path(HydraConfig.get().runtime.output_dir).rmdir()
            raise _JobFailed(result.line, result.code)
        return result.objective

    app = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name=root)(job)
    # Captures Hydra's own complaints: `reword` shortens them, and a failed job, which has printed its line already, is
    # not reported a second time as a traceback.
    captured = io.StringIO()
    code = 0
    try:
        sys.argv = [argv_before[0], *words_in_order(arguments)]
        with contextlib.redirect_stderr(captured):
            app()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if not results and isinstance(end.__context__, _JobFailed):  # the job ran in another process
            results.append(LaunchResult(end.__context__.code, end.__context__.line))
            show_result(results[-1])
    except (_StopSweep, _JobFailed):
        pass
    except KeyboardInterrupt:
        results.append(LaunchResult(Preempted.exit_code, "interrupted before a run had started"))
        show_result(results[-1])
    finally:
        sys.argv = argv_before
        ahead.dismiss()
    failed = [result for result in results if result.code != 0]
    if not failed:
        text = captured.getvalue().replace(_HYDRA_HINT, "")
        if text.strip():
            print(reword(text.strip(), conf_folder()), file=job_stderr.stream, flush=True)
        return ConfigError.exit_code if code else 0
    if len(results) > 1:
        print(
            f"esper: {len(failed)} of {len(results)} jobs did not finish; their lines stand above",
            file=job_stderr.stream,
        )
    return max((result.code for result in failed), key=_gravity)


if __name__ == "__main__":
    sys.exit(main())
