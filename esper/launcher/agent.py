"""torchrun that dies with its launcher and is deaf to stop signals: ``python -m esper.launcher.agent ARGUMENTS``.

torchrun's own agent ends on SIGUSR1 and leaves its workers behind, on SIGTERM it ends workers that may just be saving
(Slurm and systemd send it to every process of a job at once), and it outlives a launcher that was killed. So both
signals are ignored here (workers inherit that until they install their handlers, so an early one cannot kill them
either), and the kernel sends SIGHUP when the launcher dies, on which the agent takes its workers down. A worker that
stands still (SIGSTOP) hears no signal but SIGKILL and gets that at once when the group goes, where torchrun would wait
for it half a minute. Its report of failed workers, a page around a traceback of its own, becomes one line for each of
them, and so does the traceback with which it answers a signal.
Linux only, like the launcher.
"""

import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from esper.run.parent import die_with_parent


def stands_still(pid: int) -> bool:
    """Whether a child of this process is stopped, by a signal or a debugger."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except OSError:  # it ended meanwhile
        return False
    state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
    return state in "Tt" and int(parent) == os.getpid()


def kill_those_that_stand_still() -> None:
    """From now on a torchrun in this process that takes its workers down kills those that stand still at once."""
    from torch.distributed.elastic.multiprocessing.api import PContext

    close = PContext.close

    def kill_and_close(self: PContext, *args: Any, **kwargs: Any) -> None:
        for pid in self.pids().values():
            if stands_still(pid):
                os.kill(pid, signal.SIGKILL)
        close(self, *args, **kwargs)

    PContext.close = kill_and_close  # type: ignore[method-assign]


def main() -> int:
    """Runs torchrun with this process's arguments; returns its exit code."""
    # These take seconds; the signals come first.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    kill_those_that_stand_still()
    sys.argv[0] = "torchrun"
    try:
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            how = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            print(f"torchrun: rank {rank} (process {failure.pid}): {how}", file=sys.stderr, flush=True)
        return 1
    except SignalException as error:  # its workers are down by now
        print(f"torchrun: ended by {error.sigval.name}", file=sys.stderr, flush=True)
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a launcher under nohup ignores it
    die_with_parent(int(os.environ.pop("ESPER_LAUNCHER_PID")), signal.SIGHUP)
    for deaf in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(deaf, signal.SIG_IGN)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's --signals-to-handle
    sys.exit(main())
