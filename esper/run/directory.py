"""The run directory in the launcher's hands: checked, locked, made, and its small files read and written.

The names of its files are in `esper.leyline.files.RunDir`. A refused start leaves everything as it was: folders and
files that it made on the way are removed again.
"""

import errno
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from esper.accord.breaker import BreakerOrder
from esper.config.digest import differences, length_of, length_problem, same_file, same_length
from esper.config.tree import Resume, RunConfig, read_plain, write_config
from esper.leyline.errors import ConfigError, DataError, RunDirError
from esper.leyline.files import RunDir, write_json
from esper.leyline.plain import from_plain, to_plain
from esper.run.environment import describe_environment
from esper.run.extension import reopen
from esper.run.lock import take_lock
from esper.run.start.record import read_sunk


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
    result = {**result, **read_sunk(folder, result.get("flops"))}
    _write_or_raise(RunDir(folder).result, result, "all is trained and saved: see to the disk, then resume")


def write_done(folder: Path, attempt: int, *, step: int, objective: float | None) -> None:
    """Writes the RUN/STATUS.json of a finished run.

    Raises:
        RunDirError: it cannot be written.
    """
    end = {"status": "done", "message": "", "exit_code": 0}
    status = {**end, "attempt": attempt, "step": step, "objective": objective}
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
    old = read_plain(files.config)
    status, _ = read_status(folder)
    done = status is not None and status["status"] == "done" and same_length(old, plain)
    changed = differences(old, plain, done=done)
    if problem := length_problem(old, plain):
        changed.append(problem)
    elif run.resume is not Resume.MUST and not same_length(old, plain):  # no run becomes longer by mistake
        (key, was), (_, now) = length_of(old), length_of(plain)
        changed.append(
            f"{key} = {now}: the run has {was}; set {key}={was}; to make it longer: "
            f"esper resume {shlex.quote(run.dir)} {key}={now}"
        )
    if changed:
        state = " that is done," if done else ""
        own = "" if done else f"; esper resume {shlex.quote(run.dir)} key=value ... takes all others from the run"
        raise ConfigError(
            [
                f"{here}: holds a run{state} with other settings; set run.dir=<a new folder>, or set these back{own}:",
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
        elif not same_file(old := read_plain(files.config), plain):
            status, _ = read_status(folder)
            done = status is not None and status["status"] == "done"
            if not same_length(old, plain):
                reopen(folder, status, plain)
            if not (done and same_length(old, plain)):
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
