"""Checks of ``esper doctor`` on the folder in which a run will write."""

import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from esper.launcher.checks import Finding, failure, ok, run_child, warning
from esper.leyline.files import NO_LOCKS, NO_MODES, NO_SUCH_CALL

LITTLE_SPACE = 1 << 30  # bytes in the run directory
SKEW_S = 2.0  # seconds that the clocks of this machine and the file server may differ


def skew_of(file_time: float, before: float, after: float) -> float:
    """Seconds by which a file's time lies outside the interval in which it was written."""
    return max(before - file_time, file_time - after, 0.0)


def check_run_dir(run_dir: Path) -> Iterator[Finding]:
    """Checks atomic rename, locks, clock and space where a run writes; leaves nothing behind."""
    folder = next(path for path in (run_dir, *run_dir.parents) if path.exists())
    what = f"run directory {run_dir}"
    try:
        place = Path(tempfile.mkdtemp(prefix=".esper-doctor-", dir=folder))
    except OSError as error:
        yield failure(what, f"cannot be written ({error.strerror}); set run.dir=<a writable folder>")
        return
    try:
        yield from _check_inside(place, what)
    except OSError as error:
        yield failure(what, f"cannot be written ({error.strerror}); set run.dir=<a folder with space>")
    finally:
        shutil.rmtree(place, ignore_errors=True)


_LOCK = """
import fcntl, sys
try: fcntl.flock(open(sys.argv[1], "r+"), fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: print("held")
else: print("free")
"""


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_call(what: str, call: Callable[[], object], known: tuple[int, ...], cost: str) -> Finding:
    """A call that a run makes, and does without where the file system does not know it."""
    try:
        call()
    except OSError as error:
        if error.errno not in known:
            return failure(what, f"refused ({error.strerror}); set run.dir=<another folder>")
        return warning(what, f"not there ({error.strerror}); a run does without: {cost}")
    return ok(what, "as a run does it")


def _check_inside(place: Path, what: str) -> Iterator[Finding]:
    target, fresh = place / "file", place / "fresh"
    target.write_bytes(b"old" * 1000)
    before = time.time()
    with fresh.open("wb") as file:
        file.write(b"new" * 1000)
        file.flush()
        os.fsync(file.fileno())
    written, after = fresh.stat().st_mtime, time.time()
    with target.open("rb") as reader:
        fresh.replace(target)
        whole = reader.read() == b"old" * 1000 and target.read_bytes() == b"new" * 1000 and not fresh.exists()
    if whole:
        yield ok(what, "written, and replaced in one step")
    else:
        yield failure(what, "a rename does not replace a file in one step; set run.dir=<a POSIX file system>")

    yield _check_call("syncing folders", lambda: _sync_folder(place), NO_SUCH_CALL, "a power failure may undo a save")
    yield _check_call("modes", lambda: os.chmod(target, 0o644), NO_MODES, "config.yaml is not protected from changes")

    with target.open("r+b") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            what = f"none there ({error.strerror or 'refused'})"
            if error.errno in NO_LOCKS:
                yield warning("locks", f"{what}; start one at a time on a run, or mount with flock")
            else:
                yield failure("locks", f"{what}; mount with flock, or set run.dir=<another folder>")
        else:
            code, line = run_child(sys.executable, "-I", "-c", _LOCK, str(target))
            if (code, line) == (0, "held"):
                yield ok("locks", "held against another process of this host")
            else:
                yield failure("locks", f"another process found it {line}; mount with flock, or use another folder")

    skew = skew_of(written, before, after)
    if skew > SKEW_S:
        yield warning(
            "clock", f"the file server's differs by {skew:.1f} s; set both by NTP (times in logs will not fit)"
        )
    else:
        yield ok("clock", f"file times differ by {skew:.1f} s")
    stat = os.statvfs(place)
    space = stat.f_frsize * stat.f_bavail
    free = f"{space / 2**30:.1f} GiB free"
    if space < LITTLE_SPACE:
        yield warning("space", f"{free}; make room, or lower checkpoint.keep")
    else:
        yield ok("space", free)
