"""Waits that follow progress: none lasts a fixed number of seconds.

    patience = Patience(cpu_of(lambda: [pid]), size_of(log), marks_of(run))
    while not due():
        assert patience.lasts(), f"it hangs: {patience}"
        time.sleep(0.02)

A wait goes on as long as any of its signs moves: CPU time of processes, heartbeat marks, output. It ends when all of
them have stood still for ``still_s`` seconds times `load`, since a busy machine is several times slower than a quiet
one. So a slow run is waited for however long it takes, and one that hangs is told within minutes.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from esper.launcher.processes import descendants_of

STILL_S = 90.0
BUSY = 0.05  # of one CPU: who uses less only polls; on a machine that is very busy, who computes gets less, too
SAMPLE_S = 1.0

Sign = Callable[[], object]
"""Reads something off what is waited for; another value than before is progress."""


def load() -> float:
    """How many times slower than a quiet machine this one may be now: runnable threads per CPU, at least 1."""
    try:
        minute, _, _, threads, _ = Path("/proc/loadavg").read_text().split()
        runnable = max(float(minute), float(threads.split("/")[0]))
    except OSError:
        runnable = os.getloadavg()[0]
    return max(1.0, runnable / (os.cpu_count() or 1))


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, in user mode and in the kernel; 0 for one that is gone."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def tree_of(pid: int) -> set[int]:
    """A process and everything below it."""
    return {pid, *descendants_of(pid)}


def cpu_of(pids: Callable[[], Iterable[int]]) -> Sign:
    """Moves when the processes together compute rather than poll."""
    known = {pid: cpu_seconds(pid) for pid in pids()}
    bursts, since = 0, time.monotonic()

    def read() -> int:
        nonlocal known, bursts, since
        now = time.monotonic()
        if now - since >= SAMPLE_S:
            used = {pid: cpu_seconds(pid) for pid in pids()}
            computed = sum(seconds - known.get(pid, 0.0) for pid, seconds in used.items())
            if computed > BUSY / max(1.0, load() / 4.0) * (now - since):
                bursts += 1
            known, since = used, now
        return bursts

    return read


def size_of(*files: Path) -> Sign:
    """Moves when one of the files grows."""
    return lambda: [path.stat().st_size if path.exists() else -1 for path in files]


def marks_of(*runs: Path) -> Sign:
    """Moves when a rank of one of the run directories has marked where it is."""

    def read() -> list[tuple[str, int]]:
        marks = []
        for run in runs:
            for path in sorted((run / "heartbeat").glob("rank-*")):
                try:
                    marks.append((path.name, path.stat().st_mtime_ns))
                except OSError:  # replaced meanwhile
                    continue
        return marks

    return read


class Patience:
    """How long to wait for something that gets on; see the module.

    Args:
        signs: that something gets on. still_s: how long they may stand still on a quiet machine.
    """

    def __init__(self, *signs: Sign, still_s: float = STILL_S) -> None:
        self._signs, self._still_s = signs, still_s
        self._values: list[object] = [sign() for sign in signs]
        self._since, self._load = time.monotonic(), load()

    def lasts(self) -> bool:
        """Whether to wait on."""
        values = [sign() for sign in self._signs]
        if values != self._values:
            self._values, self._since, self._load = values, time.monotonic(), load()
        elif self._still() > self._still_s:
            self._load = max(self._load, load())
        return self._still() <= self._still_s * self._load

    def _still(self) -> float:
        return time.monotonic() - self._since

    def __str__(self) -> str:
        allowed = f"{self._still_s:.0f} s allowed on a quiet machine, this one is {self._load:.1f} times busier"
        return f"no progress for {self._still():.0f} s ({allowed}); its signs stand at {self._values}"


def wait_until(due: Callable[[], bool], what: str, patience: Patience, every_s: float = 0.02) -> None:
    """Returns once ``due``; fails when patience is at its end."""
    while not due():
        assert patience.lasts() or due(), f"{what} did not come: {patience}"
        time.sleep(every_s)


def run_patiently(words: Sequence[str], *, still_s: float = STILL_S, **more: Any) -> "subprocess.CompletedProcess[str]":
    """`subprocess.run` with text output captured, for as long as the command or what it started gets on.

    Args:
        words: of the command line. still_s: see `Patience`. more: of `subprocess.Popen`.
    """
    with tempfile.TemporaryDirectory(prefix="esper-command-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        with out.open("w") as out_file, err.open("w") as err_file:
            process = subprocess.Popen(words, stdout=out_file, stderr=err_file, **more)
        patience = Patience(cpu_of(lambda: tree_of(process.pid)), size_of(out, err), still_s=still_s)
        try:
            while process.poll() is None:
                if not patience.lasts():
                    raise AssertionError(f"{list(words)}: {patience}\n{out.read_text()}\n--- stderr\n{err.read_text()}")
                time.sleep(0.02)
        finally:
            for pid in tree_of(process.pid) if process.poll() is None else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
        return subprocess.CompletedProcess(list(words), process.returncode, out.read_text(), err.read_text())
