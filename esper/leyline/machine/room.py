"""Cores and memory that this process may use, of the machine and within its control groups.

Both differ from rank to rank, so they decide nothing by themselves: a rank's finding may veto a staged birth, which all
ranks then agree on, raise an alert, or say how many jobs fit at a time.
"""

import math
import os
from pathlib import Path

from esper.leyline.machine.groups import ROOT, cpu_quota, memory_limits


def usable_cores(root: Path = ROOT) -> int:
    """Whole cores that this process may keep busy, at least 1: those it may run on, within its quota of CPU time."""
    quota = cpu_quota(root)
    cores = len(os.sched_getaffinity(0))
    return cores if quota is None else max(1, min(cores, math.floor(quota)))


def describe_cores(root: Path = ROOT) -> str:
    """The cores in words, as in ``4 cores`` or ``4 of 64 cores (a quota of 4.5)``."""
    cores, usable, quota = len(os.sched_getaffinity(0)), usable_cores(root), cpu_quota(root)
    return f"{cores} cores" if usable == cores else f"{usable} of {cores} cores (a quota of {quota:g})"


def _machine(root: Path) -> tuple[int, int] | None:
    """Memory of the machine and what is free of it, in bytes; None if nobody says."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return 1024 * kib["MemTotal"], 1024 * kib["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        return None


def free_memory(root: Path = ROOT) -> int | None:
    """Bytes that this process can still have, of the machine and within its groups; None if nobody says."""
    found = [max(0, limit - used) for limit, used in memory_limits(root)]
    machine = _machine(root)
    return min(found if machine is None else [*found, machine[1]], default=None)


def used_share(root: Path = ROOT) -> float | None:
    """Share in use of the machine's memory, or of a group's that is nearer to its limit; None if nobody says."""
    shares = [used / limit for limit, used in memory_limits(root) if limit > 0]
    machine = _machine(root)
    if machine is not None and machine[0] > 0:
        shares.append(1.0 - machine[1] / machine[0])
    return max(shares, default=None)
