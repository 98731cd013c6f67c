"""Asks a process of its own whether a run's parts fit each other, before any rank starts.

Settings say it of what is shipped (`esper.config.fitting`). A host, data or a task of the user's own say it when they
are built and given a few samples: so that is done once beforehand, where a misfit is one line and leaves no run
directory.
What it costs is one import and one load of the data; a run that goes on has been tried.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esper.leyline.errors import ConfigError, DataError
from esper.leyline.files import RunDir

OWN = ("custom", "hf")  # kinds of which only the built parts can tell


def ask_whether_parts_fit(plain: Mapping[str, Any], environment: Mapping[str, str], folder: Path) -> None:
    """Tries parts of the user's own on a few samples; nothing to do for shipped ones, or for a run that goes on.

    Args:
        plain: the run's settings.
        environment: variables of its ranks, beside this process's.
        folder: RUN, which need not exist.

    Raises:
        ConfigError, DataError: the error that every rank would end with.
    """
    own = any(plain[section]["kind"] in OWN for section in ("data", "task")) or plain["host"]["kind"] == "custom"
    if not own or RunDir(folder).config.is_file():
        return
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
    if not text:  # it could not be tried here, which is no misfit
        return
    verdict = json.loads(text)
    if verdict["code"] == ConfigError.exit_code:
        raise ConfigError(verdict["lines"])
    if verdict["code"] == DataError.exit_code:
        raise DataError("\n".join(verdict["lines"]))
