"""The run directory in the launcher's hands: checked, locked, made, and its small files read and written.

The names of its files are in `esper.leyline.files.RunDir`. A refused start leaves everything as it was: folders and
files that it made on the way are removed again.
"""

import errno
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esper.accord.breaker import BreakerOrder
from esper.config.digest import differences, same_file
from esper.config.tree import Resume, RunConfig, read_plain, write_config
from esper.leyline.errors import ConfigError, DataError, RunDirError
from esper.leyline.files import RunDir, package_folder, write_json
from esper.leyline.plain import from_plain, to_plain
from esper.run.lock import take_lock

_PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "wandb", "scikit-learn", "xxhash", "pyarrow", "pillow")


def find_run(folder: Path) -> RunDir:
    """Returns the file names of an existing run.

    Raises:
        RunDirError: the folder is no run directory.
    """
    files = RunDir(folder)
    if not files.config.is_file():
        name = files.config.name
        raise RunDirError(f"{folder}: no {name} in it, so it is no run; name a run directory, as in runs/DATE/TIME")
    return files


def write_order(folder: Path, order: BreakerOrder) -> None:
    """Writes RUN/breaker.json; replaces an earlier order."""
    write_json(RunDir(folder).order, to_plain(order))


def read_order(folder: Path) -> BreakerOrder | None:
    """Reads the latest order; None without one.

    Raises:
        ConfigError: the file cannot be read, or holds no order.
    """
    path = RunDir(folder).order
    try:
        return from_plain(BreakerOrder, json.loads(path.read_text()), path.name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: no order to the breaker ({error}); remove it, or give the order again") from None


def check_same_data(folder: Path, record: dict[str, Any], *, trained: bool, write: bool) -> None:
    """Refuses other data than the run has trained on, and records the data that it begins with.

    Args:
        folder: the run directory.
        record: describes the data that are here now, equal on all ranks (`esper.tolaria.data.Bundle`).
        trained: whether the run has checkpoints.
        write: whether this rank writes the record.

    Raises:
        DataError: the data differ from RUN/data.json, or that file cannot be read; the same on every rank.
        RunDirError: RUN/data.json cannot be written.
    """
    path = RunDir(folder).data
    kept = None
    if trained:
        try:
            kept = json.loads(path.read_text())["digest"]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error}); restore it from a copy, or begin a new run") from None
    if kept is not None and kept != record["digest"]:
        raise DataError(
            f"{folder}: this run trains on other data ({record['kind']} of digest {kept}, now {record['digest']}; "
            f"files: {path}); give those back (data.root, ESPER_DATA), or begin a new run"
        )
    if write and kept is None:
        _write_or_raise(path, record, "see to the disk, then start again")


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Writes RUN/result.json.

    Raises:
        RunDirError: it cannot be written.
    """
    _write_or_raise(RunDir(folder).result, result, "all is trained and saved: see to the disk, then resume")


def write_done(folder: Path, *, step: int, objective: float | None) -> None:
    """Writes the RUN/STATUS.json of a finished run.

    Raises:
        RunDirError: it cannot be written.
    """
    status = {"status": "done", "message": "", "exit_code": 0, "step": step, "objective": objective}
    _write_or_raise(RunDir(folder).status, status, "all is trained and saved: see to the disk, then resume")


def _write_or_raise(path: Path, value: dict[str, Any], advice: str) -> None:
    """Writes JSON; a RunDirError says what to do where that fails."""
    try:
        write_json(path, value)
    except OSError as error:
        raise RunDirError(f"{path}: cannot be written ({error.strerror}); {advice}") from error


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _advice(error: OSError, folder: Path) -> str:
    """What to do about an error of a run directory that was to be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room there, or set run.dir=<a folder with space>"
    if error.errno == errno.ENAMETOOLONG:
        return "set run.dir=<a shorter path; a name may have 255 bytes>"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and not os.access(folder, os.W_OK):
        return "set run.dir=<a writable folder>"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"the folder is writable, {error.filename} is not: give it to yourself, or set run.dir=<a new folder>"
    return f"see what esper doctor --run-dir {shlex.quote(str(folder))} finds, or set run.dir=<a folder elsewhere>"


def check_run(run: RunConfig, plain: dict[str, Any]) -> bool:
    """Whether the run directory holds a run with these settings already.

    Raises:
        RunDirError: it is no folder, holds something else, or ``run.resume`` forbids its state.
        ConfigError: it holds a run with other settings; the text lists every difference.
    """
    folder = Path(run.dir)
    here = f"run.dir = {run.dir!r}"
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        names = []
    except NotADirectoryError:
        raise RunDirError(f"{here}: is not a folder; set run.dir=<a folder>") from None
    except OSError as error:
        raise RunDirError(f"{here}: cannot be read ({_reason(error)}); set run.dir=<another folder>") from None
    files = RunDir(folder)
    if files.config.name not in names:
        foreign = [name for name in names if name not in (files.lock.name, files.environment.name)]
        if foreign:
            raise RunDirError(
                f"{here}: holds {', '.join(foreign[:3])} but no {files.config.name}, so it is no run; "
                "set run.dir=<a new folder>"
            )
        if run.resume is Resume.MUST:
            raise RunDirError(f"{here}: no run to resume there; set run.resume=auto to start one")
        return False
    if run.resume is Resume.NEVER:
        raise RunDirError(
            f"{here}: holds a run already; set run.dir=<a new folder>, or run.resume=auto to go on with it"
        )
    changed = differences(read_plain(files.config), plain)
    if changed:
        raise ConfigError(
            [
                f"{here}: holds a run with other settings; set run.dir=<a new folder>, or set these back:",
                *(f"  {line}" for line in changed),
            ]
        )
    return True


@contextmanager
def hold_run(run: RunConfig, plain: dict[str, Any]) -> Iterator[int]:
    """Makes the run directory, or takes the existing one, and locks it; yields the lock's descriptor.

    Raises:
        ConfigError: see `check_run`.
        RunDirError: see `check_run`; or it is locked, or cannot be written.
    """
    check_run(run, plain)
    folder, files = Path(run.dir), RunDir(Path(run.dir))
    created: list[Path] = []
    descriptor = -1
    try:
        for path in reversed([folder, *folder.parents]):
            if not path.exists():
                path.mkdir(0o775)  # whatever the umask: in a folder open to all, anyone could replace config.yaml
                created.append(path)
        fresh_lock = not files.lock.exists()
        descriptor = take_lock(folder)
        if fresh_lock:
            created.append(files.lock)
        known = check_run(run, plain)  # again, now that no other launcher can change it
        if not known:
            created.append(files.config)  # before it is written: a sync may fail after the file has its name
            write_config(files.config, plain)
        elif not (_is_done(folder) or same_file(read_plain(files.config), plain)):
            write_config(files.config, plain)
        if not files.environment.exists():
            created.append(files.environment)
        write_json(files.environment, describe_environment(files.environment))
    except BaseException as error:
        for path in reversed(created):
            with suppress(OSError):  # it was not made yet
                path.rmdir() if path.is_dir() else path.unlink()
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(error, OSError):
            raise RunDirError(
                f"run.dir = {run.dir!r}: cannot be written ({_reason(error)}: {error.filename}); "
                f"{_advice(error, folder)}"
            ) from None
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


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


def _is_done(folder: Path) -> bool:
    status, _ = read_status(folder)
    return status is not None and status["status"] == "done"


def read_status(folder: Path) -> tuple[dict[str, Any] | None, tuple[int, int] | None]:
    """Reads the last status, and a mark of the file that changes whenever it is written anew; None, None without one.

    Raises:
        RunDirError: the file exists but cannot be read as a status.
    """
    path = RunDir(folder).status
    try:
        with path.open() as file:
            stat = os.fstat(file.fileno())
            status = json.load(file)
    except FileNotFoundError:
        return None, None
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: not readable ({error}); remove it and start the run again") from None
    if not isinstance(status, dict) or not isinstance(status.get("status"), str):
        raise RunDirError(f"{path}: holds no status; remove it and start the run again")
    return status, (stat.st_ino, stat.st_mtime_ns)
