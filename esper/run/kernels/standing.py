"""Whether a process gets on, by the CPU time that the kernel counts for it and for what it has started (proc(5))."""

import os
import time
from pathlib import Path

_HERTZ = os.sysconf("SC_CLK_TCK")
_LEAST = 0.05  # share of a core that whoever computes gets, however full the machine; who only waits takes less


def cpu_seconds(root: int) -> float:
    """CPU seconds of a process, of all below it, and of those of them that have ended."""
    parents, used = dict[int, int](), dict[int, float]()
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            words = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        parents[int(entry)], used[int(entry)] = int(words[1]), sum(map(int, words[11:15])) / _HERTZ
    family, newest = set[int](), {root}
    while newest:
        family |= newest
        newest = {pid for pid, parent in parents.items() if parent in newest} - family
    return sum(used.get(pid, 0.0) for pid in family)


class Standstill:
    """Notices that a process and all that it has started do not get on.

    Args:
        root: process id.
        seconds: for how long they must not have computed.
    """

    def __init__(self, root: int, seconds: float) -> None:
        self._root, self._seconds = root, seconds
        self._since, self._used = time.monotonic(), cpu_seconds(root)

    def __call__(self) -> bool:
        """Whether they have not got on; looks once in so many seconds, and is False between."""
        passed = time.monotonic() - self._since
        if passed < self._seconds:
            return False
        before, self._used, self._since = self._used, cpu_seconds(self._root), time.monotonic()
        return self._used - before < _LEAST * passed
