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
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from esper.config.tree import build_config
from esper.launcher.start import LaunchResult, results_of_errors, show_result, start
from esper.leyline.errors import ConfigError, EsperError, Preempted
from esper.leyline.files import package_folder

LAUNCHES = ("run", "prepare", "plan")
_BY_GRAVITY = (0, 75, 78, 74, 79, 76, 70)  # exit codes, the gravest last
_HYDRA_HINT = "Set the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."


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
    package = package_folder()
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


def _job(composed: DictConfig) -> LaunchResult:
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
    outcomes: list[LaunchResult] = []
    words, before = _Words(sys.stderr), sys.argv

    def job(composed: DictConfig) -> float | None:
        outcome: list[LaunchResult] = []
        sweep = HydraConfig.get().mode is RunMode.MULTIRUN
        with contextlib.redirect_stderr(words.stream):
            with results_of_errors(outcome):
                outcome.append(_job(composed))
            outcomes.append(outcome[0])
            show_result(outcome[0])
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
            outcomes.append(LaunchResult(end.__context__.code, end.__context__.line))
            show_result(outcomes[-1])
    except (_StopSweep, _JobFailed):
        pass
    except KeyboardInterrupt:
        outcomes.append(LaunchResult(Preempted.exit_code, "interrupted before a run had started"))
        show_result(outcomes[-1])
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
