"""Whether a core of this machine has nothing to do, as the kernel counts it (proc(5), /proc/stat).

Of the cores that this process may use, the time that they were idle since the last look is added up; in a container
with a quota of processor time (cgroup v2, cpu.max) it is what the quota left, if that is less.
"""

import os
import time
from pathlib import Path

SHORTEST_S = 0.1  # the kernel counts in hundredths of a second
ENOUGH = 0.5  # cores that were idle on average


class IdleCores:
    """Says whether a core is idle; by what went on since it was asked before.

    Args:
        stat: the kernel's counts of each core.
        group: this container's control group.
    """

    def __init__(self, stat: Path = Path("/proc/stat"), group: Path = Path("/sys/fs/cgroup")) -> None:
        self._stat, self._group = stat, group
        self._cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        self._hertz = os.sysconf("SC_CLK_TCK")
        self._last = self._read()
        self._enough = False

    def _read(self) -> tuple[float, float, float]:
        """Now, and seconds so far: idle, summed over cores, and used by the container."""
        idle = used = 0.0
        try:
            for line in self._stat.read_text().splitlines():
                name, *counts = line.split()
                if name in self._cores:
                    idle += sum(map(int, counts[3:5])) / self._hertz  # idle, and waiting for a disk
            used = int((self._group / "cpu.stat").read_text().split()[1]) / 1e6
        except (OSError, ValueError, IndexError):  # no such kernel, or no such group
            pass
        return time.monotonic(), idle, used

    def _quota(self) -> float | None:
        """Cores that the container may use; None: all."""
        try:
            most, period = (self._group / "cpu.max").read_text().split()
            return None if most == "max" else int(most) / int(period)
        except (OSError, ValueError):
            return None

    def __call__(self) -> bool:
        """Whether half a core or more was idle since the last call; within a tenth of a second the answer stays."""
        now, idle, used = self._read()
        passed = now - self._last[0]
        if passed >= SHORTEST_S:
            free, quota = (idle - self._last[1]) / passed, self._quota()
            if quota is not None:
                free = min(free, quota - (used - self._last[2]) / passed)
            self._last, self._enough = (now, idle, used), free >= ENOUGH
        return self._enough
