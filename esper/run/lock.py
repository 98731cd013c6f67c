"""RUN/lock: one start at a time works in a run directory.

    process 4711 on host a      who holds it
    launch 3f2a90c41b7d         the rendezvous that the holder has started; its ranks need no lock of their own

The launcher holds the lock and hands the descriptor to its torchrun. Rank 0 of a torchrun that was typed by hand takes
it itself. Where a file system has no locks, a start goes on by the lease alone (`esper.run.attempt`), with a warning.
"""

import fcntl
import os
import socket
from pathlib import Path

from esper.leyline.errors import InUseError
from esper.leyline.files import NO_LOCKS, RunDir
from esper.nissa.lane import say

LOCKED = "ESPER_LOCKED"  # variable: the run directory whose lock a process above this one holds


def take_lock(folder: Path, launch: str = "") -> int:
    """Locks the run directory; returns the descriptor of the lock, which holds it until it is closed.

    Args:
        folder: RUN.
        launch: name of our rendezvous; ranks of that name have the lock already.

    Raises:
        InUseError: another process holds it.
        OSError: the file cannot be opened.
    """
    path = RunDir(folder).lock
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder, *more = os.read(descriptor, 1000).decode(errors="replace").splitlines() or ["another process"]
        if launch and f"launch {launch}" in more:
            return descriptor
        os.close(descriptor)
        raise InUseError(
            f"run.dir = {str(folder)!r}: in use by {holder}; "
            "wait for it, stop it with a SIGTERM to its launcher, or set run.dir=<a new folder>"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(descriptor)
            raise
        say(
            f"{path}: this file system has no locks ({error.strerror}), so two starts on one run are told apart by "
            "their attempts only: start one at a time, or mount with flock"
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)
    return descriptor


def name_launch(descriptor: int, launch: str) -> None:
    """Writes the name of the rendezvous that the holder of a lock starts."""
    os.pwrite(descriptor, f"launch {launch}\n".encode(), os.fstat(descriptor).st_size)


def lock_by_hand(folder: Path) -> int | None:
    """Locks the run directory unless a process above this one holds the lock; returns the descriptor, or None.

    Raises:
        InUseError: another start holds it.
        OSError: the file cannot be opened.
    """
    if os.environ.get(LOCKED) == str(folder):
        return None
    return take_lock(folder, os.environ.get("TORCHELASTIC_RUN_ID", ""))
