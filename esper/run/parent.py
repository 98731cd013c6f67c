"""Ties a process to its parent: it ends with it, or adopts the orphans below it. Linux only (prctl)."""

import ctypes
import os
import signal
import sys

PARENT = os.getppid()  # when this was imported: a worker does that first, and its parent may die while it imports torch

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}): {os.strerror(ctypes.get_errno())}")


def die_with_parent(parent: int, signum: int = signal.SIGTERM) -> None:
    """Asks the kernel for ``signum`` when the process ``parent``, which started this one, dies.

    Exits with code 70 if the parent is dead already.
    """
    _prctl(_PR_SET_PDEATHSIG, int(signum))
    if os.getppid() != parent:
        sys.exit(70)


def adopt_orphans(adopt: bool) -> None:
    """Makes descendants whose parent dies children of this process from now on; with False, no longer."""
    _prctl(_PR_SET_CHILD_SUBREAPER, int(adopt))
