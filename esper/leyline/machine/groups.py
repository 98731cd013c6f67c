"""Limits that control groups set: CPU time and memory of a container, a job or a service.

Version 2 has one tree of groups, version 1 one for each controller, and a machine may have both. A process has the
limits of its own group and of all groups above it. Sources: Linux, admin-guide/cgroup-v2.rst, cgroup-v1/memory.rst
and scheduler/sched-bwc.rst.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")


def groups_of(controller: str, root: Path = ROOT) -> Iterator[tuple[int, Path]]:
    """Yields version and folder of this process's groups, from its own to the topmost that it can see.

    Args:
        controller: ``cpu`` or ``memory``.
        root: where ``proc`` and ``sys`` lie.
    """
    try:
        own = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    for line in own:
        _, controllers, path = line.split(":", 2)
        version = 1 if controllers else 2
        if version == 1 and controller not in controllers.split(","):
            continue
        for mount in mounts:
            left, _, right = mount.partition(" - ")
            kind, _, options = right.split(" ", 2)
            if kind != ("cgroup", "cgroup2")[version - 1] or (version == 1 and controller not in options.split(",")):
                continue
            within, at = left.split(" ")[3:5]
            top = root / at.lstrip("/")
            # A container may know its group by the host's path, while what is mounted is that group itself.
            inside = Path(path).is_relative_to(within)
            folder = top / Path(path).relative_to(within) if inside else top
            for group in (folder, *folder.parents):
                yield version, group
                if group == top:
                    break
            break


def _number(path: Path, name: str | None = None) -> int | None:
    """The number in a group's file, or that of one of its lines; None if there is none."""
    try:
        text = path.read_text()
        if name is not None:
            text = next(line.split()[1] for line in text.splitlines() if line.split()[0] == name)
        return int(text)
    except (OSError, ValueError, StopIteration):
        return None


@dataclass(frozen=True, slots=True)
class CpuGroup:
    """A control group with a quota of CPU time.

    Fields:
        quota: cores' worth of time that all its processes may use together.
        used_s: seconds that they have used so far; None if the kernel does not say.
    """

    quota: float
    used_s: float | None


def cpu_groups(root: Path = ROOT) -> dict[Path, CpuGroup]:
    """By its folder, each group of this process that has a quota of CPU time.

    Version 1 counts what was used in another controller, which mostly lies in the same tree.
    """
    found = {}
    counted = [group for version, group in groups_of("cpuacct", root) if version == 1]
    limited = [group for version, group in groups_of("cpu", root) if version == 1]
    for place, group in enumerate(limited):
        quota, period = _number(group / "cpu.cfs_quota_us"), _number(group / "cpu.cfs_period_us")
        if quota is not None and quota > 0 and period:
            same = len(counted) == len(limited)
            used = _number(counted[place] / "cpuacct.usage") if same else None
            found[group] = CpuGroup(quota / period, None if used is None else used / 1e9)
    for version, group in groups_of("cpu", root):
        if version == 1:
            continue
        try:
            most, length = (group / "cpu.max").read_text().split()
            if most == "max":
                continue
            used = _number(group / "cpu.stat", "usage_usec")
            found[group] = CpuGroup(int(most) / int(length), None if used is None else used / 1e6)
        except (OSError, ValueError):
            continue
    return found


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores' worth of CPU time that this process may use; None without a limit."""
    return min((group.quota for group in cpu_groups(root).values()), default=None)


def memory_limits(root: Path = ROOT) -> list[tuple[int, int]]:
    """Limit and use, in bytes, of each group with a limit.

    Pages of files that nobody has read lately do not count as used: the kernel gives them up before it kills anybody.
    """
    found = []
    for version, group in groups_of("memory", root):
        if version == 1:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            names = ("memory.max", "memory.current", "inactive_file")
        limit, used = _number(group / names[0]), _number(group / names[1])  # "max" is no number
        if limit is not None and used is not None:
            found.append((limit, max(0, used - (_number(group / "memory.stat", names[2]) or 0))))
    return found
