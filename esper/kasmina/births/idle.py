"""Whether a core of this machine has nothing to do, as the kernel counts it (proc(5), /proc/stat).

Of the cores that this process may use, the time that they were idle since the last look is added up. In control groups
with a quota of CPU time it is what the tightest of them left, if that is less (see `esper.leyline.machine.groups`).
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from esper.leyline.machine.groups import ROOT, CpuGroup, cpu_groups

SHORTEST_S = 0.1  # the kernel counts in hundredths of a second
ENOUGH = 0.5  # cores that were idle on average


@dataclass(frozen=True, slots=True)
class _Look:
    """What the kernel had counted at a time (seconds): idle cores, in seconds, and the groups with a quota."""

    at: float
    idle_s: float
    groups: dict[Path, CpuGroup]


class IdleCores:
    """Says whether a core is idle; by what went on since it was asked before.

    Args:
        root: where ``proc`` and ``sys`` lie.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        self._hertz = os.sysconf("SC_CLK_TCK")
        self._last = self._look()
        self._enough = False

    def _look(self) -> _Look:
        idle = 0.0
        try:
            for line in (self._root / "proc/stat").read_text().splitlines():
                name, *counts = line.split()
                if name in self._cores:
                    idle += sum(map(int, counts[3:5])) / self._hertz  # idle, and waiting for a disk
        except (OSError, ValueError):  # no such kernel: no core is known to be idle
            pass
        return _Look(time.monotonic(), idle, cpu_groups(self._root))

    def __call__(self) -> bool:
        """Whether half a core or more was idle since the last call; within a tenth of a second the answer stays."""
        if time.monotonic() - self._last.at >= SHORTEST_S:
            before, self._last = self._last, self._look()
            passed = self._last.at - before.at
            free = [(self._last.idle_s - before.idle_s) / passed]
            free += [_left_of(group, before.groups.get(path), passed) for path, group in self._last.groups.items()]
            self._enough = min(free) >= ENOUGH
        return self._enough


def _left_of(group: CpuGroup, before: CpuGroup | None, seconds: float) -> float:
    """Cores of its quota that a group left; none if it is new or nobody counts, since then it may be used up."""
    if before is None or before.used_s is None or group.used_s is None:
        return 0.0
    return group.quota - (group.used_s - before.used_s) / seconds
