"""Asks a process of its own whether a run's parts fit each other, before any rank starts.

Settings say it of what is shipped (`esper.config.fitting`). A host, data or a task of the user's own say it when they
are built and given a few samples: so that is done once beforehand, where a misfit is one line and leaves no run
directory. What it costs is one load of the data, and an import where no process was started ahead; a run that goes on
has been tried.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from esper.leyline.errors import ConfigError, DataError
from esper.leyline.files import RunDir

OWN = ("custom", "hf")  # kinds of which only the built parts can tell


class Tries(Protocol):
    """A process that has imported what a trial needs."""

    def try_parts(self, plain: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
        """The verdict (`esper.run.fitting.trial.verdict_of`); None if there is no such process, or none came."""


def ask_whether_parts_fit(
    plain: Mapping[str, Any], environment: Mapping[str, str], folder: Path, ready: Tries | None = None
) -> None:
    """Tries parts of the user's own on a few samples; nothing to do for shipped ones, or for a run that goes on.

    Args:
        plain: the run's settings.
        environment: variables of its ranks, beside this process's.
        folder: RUN, which need not exist.
        ready: a process that can try them at once; without one another is started.

    Raises:
        ConfigError, DataError: the error that every rank would end with.
    """
    own = any(plain[section]["kind"] in OWN for section in ("data", "task")) or plain["host"]["kind"] == "custom"
    if not own or RunDir(folder).config.is_file():
        return
    verdict = None if ready is None else ready.try_parts(plain, environment)
    if verdict is None:
        verdict = _try_in_new_process(plain, environment)
    if verdict is None:  # it could not be tried here, which is no misfit
        return
    if verdict["code"] == ConfigError.exit_code:
        raise ConfigError(verdict["lines"])
    if verdict["code"] == DataError.exit_code:
        raise DataError("\n".join(verdict["lines"]))


def _try_in_new_process(plain: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any] | None:
    ours, theirs = os.pipe()
    words = [sys.executable, "-m", "esper.run.fitting.trial", str(theirs)]
    with os.fdopen(ours, "rb") as said:
        child = subprocess.Popen(
            words,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(theirs,),
        )
        os.close(theirs)
        try:
            child.communicate(json.dumps(plain).encode())
        except BaseException:  # a signal to this process
            child.kill()
            child.wait()
            raise
        text = said.read()
    verdict: dict[str, Any] | None = json.loads(text) if text else None
    return verdict
