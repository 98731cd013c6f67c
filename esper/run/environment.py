"""Describes what a run is started on: machine, Python, packages, git, command line; and how long its start takes.

A start is told phase by phase, from the launcher's first moment to rank 0's first optimizer step:

    compose   the launcher has read its settings          prepare   RUN is made and locked
    check     ... and they are checked as a whole         agent     torchrun has started rank 0

    import    rank 0 has imported its program             build     model, slots, optimizer
    meet      the ranks have met                          agree     handshakes, and the checkpoint that they go on from
    data      the data are read                           step      the first optimizer step

A start by hand, and one that torchrun repeats, has the phases of the rank alone. Times are of the machine's own clock
since it was started, which all its processes share and nobody sets.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from esper.leyline.files import RunDir, package_folder, write_json
from esper.leyline.machine.room import usable_cores
from esper.nissa.lane import say

STARTED = "ESPER_STARTED"  # variable: the launcher's phases, for rank 0
SET_UP = "ESPER_SET_UP"  # variable: when a shell had set up, in seconds since boot; it then becomes this process
_PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "wandb", "scikit-learn", "xxhash", "pyarrow", "pillow")


def _git(*arguments: str) -> str | None:
    """Output of git in the project's checkout; None without a checkout or without git."""
    folder = package_folder().parent
    if not (folder / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def describe_environment(earlier: Path) -> dict[str, Any]:
    """Describes machine and software of this start; lists the starts before it, which the file ``earlier`` holds."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    changed = _git("status", "--porcelain")
    now = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "usable_cpus": usable_cores(),
        "python": platform.python_version(),
        "executable": sys.executable,
        "packages": versions,
        "git": {"commit": _git("rev-parse", "HEAD"), "changed": None if changed is None else changed.splitlines()},
        "command": shlex.join(sys.argv),
        "folder": os.getcwd(),
    }
    try:
        before = json.loads(earlier.read_text())
    except (FileNotFoundError, ValueError):
        before = None
    history = [] if not isinstance(before, dict) else [*before.pop("earlier", []), before]
    return {**now, "earlier": history}


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def process_began() -> float:
    """When this process was started, or the shell that became it had set up, in seconds since boot (to 0.01 s)."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return max(int(fields[19]) / os.sysconf("SC_CLK_TCK"), float(os.environ.get(SET_UP, "0")))


class Phases:
    """When each phase of a start ended.

    Args:
        began: when the first phase began; now unless given.
        ends: phase -> when it ended.
    """

    def __init__(self, began: float | None = None, ends: Mapping[str, float] | None = None) -> None:
        self._began = _now() if began is None else began
        self._ends = dict(ends or {})

    @classmethod
    def of_rank(cls) -> "Phases":
        """Goes on from those of a launcher on this machine in a rank's first attempt; else begins with this process."""
        told = json.loads(os.environ.get(STARTED, "{}"))
        repeated = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if repeated or told.get("host") != socket.gethostname():  # clocks of two machines do not go alike
            return cls(process_began())
        return cls(told["began"], told["ends"])

    def end(self, phase: str, when: Callable[[], float] = _now) -> None:
        """Ends a phase; if it has ended before, it has lasted until now."""
        self._ends[phase] = when()

    def has(self, phase: str) -> bool:
        """Whether a phase has ended."""
        return phase in self._ends

    def to_text(self) -> str:
        """For `STARTED`."""
        return json.dumps({"host": socket.gethostname(), "began": self._began, "ends": self._ends})

    def seconds(self) -> dict[str, float]:
        """The length of each phase, in seconds, in their order."""
        lengths, before = {}, self._began
        for phase, end in sorted(self._ends.items(), key=lambda item: item[1]):
            lengths[phase], before = round(end - before, 2), end
        return lengths


def write_start(run_dir: Path, seconds: Mapping[str, float]) -> None:
    """Adds the seconds of this start to RUN/environment.json; says so if that fails, for the run goes on without."""
    path = RunDir(run_dir).environment
    try:
        write_json(path, {**json.loads(path.read_text()), "start": dict(seconds)})
    except FileNotFoundError:  # RUN was made by hand, and has none
        return
    except (OSError, ValueError, TypeError) as error:
        say(f"{path}: the seconds of this start are not in it ({error})")
