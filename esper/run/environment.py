"""Describes what a run is started on: machine, Python, packages, git, command line."""

import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from esper.leyline.files import package_folder

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
