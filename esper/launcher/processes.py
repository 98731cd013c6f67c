"""Processes of this machine, as /proc has them: their families, the signals that they catch, their states."""

import os
from pathlib import Path


def _processes() -> dict[int, tuple[int, bool]]:
    """The parent of every process, and whether it is alive (False for a zombie), from /proc."""
    processes = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path("/proc", entry, "stat").read_text()
            except OSError:  # it ended meanwhile
                continue
            state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
            processes[int(entry)] = (int(parent), state != "Z")
    return processes


def children_of(pid: int, *, alive: bool = True) -> list[int]:
    """The children of a process: the live ones, or the zombies that it has not waited for."""
    return [child for child, (parent, lives) in _processes().items() if parent == pid and lives == alive]


def descendants_of(pid: int) -> set[int]:
    """The live processes below a process, at any depth."""
    processes, descendants, newest = _processes(), set[int](), {pid}
    while newest:
        newest = {child for child, (parent, lives) in processes.items() if parent in newest and lives} - descendants
        descendants |= newest
    return descendants


def catches(pid: int, signum: int, mask: str = "SigCgt:") -> bool:
    """Whether a process has a handler for a signal now; with ``mask="SigBlk:"`` whether it blocks the signal."""
    try:
        lines = Path("/proc", str(pid), "status").read_text().splitlines()
    except OSError:
        return False
    bits = next((int(line.split()[1], 16) for line in lines if line.startswith(mask)), 0)
    return bool(bits >> (signum - 1) & 1)


def leads_session(pid: int) -> bool:
    """Whether a process leads a session of its own, as torchrun's workers do; the process that forks them does not."""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def describe_state(pid: int) -> str:
    """The state of a process, and where it waits in the kernel: ``state D in nfs_wait``."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except OSError:
        return "gone meanwhile"
    state = stat[stat.rindex(")") + 2 :].split()[0]
    try:
        where = Path("/proc", str(pid), "wchan").read_text().strip("0\n")
    except OSError:
        where = ""
    return f"state {state} in {where}" if where else f"state {state}"
