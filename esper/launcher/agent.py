"""torchrun that dies with its launcher and ignores stop signals: ``python -m esper.launcher.agent ARGUMENTS``.

The launcher starts it before it knows the arguments (``python -m esper.launcher.agent ahead``), so that it imports
torch meanwhile, see `esper.launcher.ahead.process`.

torchrun's own agent behaves badly in three ways. On SIGUSR1 it ends and leaves its workers behind. On SIGTERM it ends
workers that may just be saving (Slurm and systemd send it to every process of a job at once). And it outlives a
launcher that was killed. So both signals are ignored here; workers inherit that until they install their handlers, so
an early signal cannot kill them either. When the launcher dies, the kernel sends SIGHUP, and the agent takes its
workers down.

A stopped worker (SIGSTOP) reacts to no signal but SIGKILL. It gets that at once when the group is taken down; torchrun
would wait for it for half a minute. torchrun reports failed workers by a page around a traceback of its own; here that
becomes one line for each worker, and so does the traceback with which it answers a signal.

Ranks are forked by a process that has imported torch and esper once (`esper.launcher.ahead.forks`), those that torchrun
starts again, too. A torchrun that is typed by hand goes without all this.

Linux only, like the launcher.
"""

import esper.run.leaving  # noqa: F401 - first, as it says, since ranks are forked off this process

# isort: split

import os
import runpy
import signal
import sys
from collections.abc import MutableMapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from esper.launcher.ahead.forks import RankServer, fork_ranks, open_files, start_server
from esper.launcher.ahead.process import AHEAD, wait_for_word
from esper.launcher.ahead.server import set_command_line
from esper.launcher.ahead.torchrun import agent_command
from esper.nissa.lane import say
from esper.nissa.screen import open_closed_streams, safe_streams
from esper.run.parent import die_with_parent


def is_stopped(pid: int) -> bool:
    """Whether a process is a child of this one and stopped, by a signal or a debugger."""
    try:
        stat = Path("/proc", str(pid), "stat").read_text()
    except OSError:  # it ended meanwhile
        return False
    state, parent = stat[stat.rindex(")") + 2 :].split()[:2]
    return state in "Tt" and int(parent) == os.getpid()


def kill_stopped_workers_at_once() -> None:
    """From now on a torchrun in this process that takes its workers down kills stopped ones at once."""
    from torch.distributed.elastic.multiprocessing.api import PContext

    close = PContext.close

    def kill_and_close(self: PContext, *args: Any, **kwargs: Any) -> None:
        for pid in self.pids().values():
            if is_stopped(pid):
                os.kill(pid, signal.SIGKILL)
        close(self, *args, **kwargs)

    PContext.close = kill_and_close  # type: ignore[method-assign]


def drop_settings_of_torchrun(environ: MutableMapping[str, str]) -> None:
    """Removes torchrun's own variables (PET_NNODES, PET_STANDALONE, ...), which would overrule the run's settings."""
    if names := sorted(name for name in environ if name.startswith("PET_")):
        say(f"{', '.join(names)}: not passed on to torchrun, which takes its arguments from world.*")
    for name in names:
        del environ[name]


def module_of(arguments: list[str]) -> str:
    """The module that torchrun's arguments name."""
    return arguments[arguments.index("-m") + 1]


@safe_streams()
def main(server: RankServer | None = None) -> int:
    """Runs torchrun with this process's arguments; returns its exit code.

    Args:
        server: forks the ranks; without one Python starts them.
    """
    # Imported here, not above: they take seconds, and the signals must be set before.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    drop_settings_of_torchrun(os.environ)
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGINT,SIGHUP,SIGQUIT"  # torchrun's --signals-to-handle
    kill_stopped_workers_at_once()
    if server is not None:
        fork_ranks(server)
    sys.argv[0] = "torchrun"
    try:
        runpy.run_module("torch.distributed.run", run_name="__main__", alter_sys=True)
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items()):
            reason = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
            print(f"torchrun: rank {rank} (process {failure.pid}): {reason}", file=sys.stderr, flush=True)
        return 1
    except SignalException as error:  # its workers are down by now
        print(f"torchrun: ended by {error.sigval.name}", file=sys.stderr, flush=True)
        return 128 + error.sigval
    return 0


def tie_to_launcher() -> None:
    """Sets this process's signals: what must stand before torch is imported."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # a launcher under nohup ignores it
    die_with_parent(int(os.environ.pop("ESPER_LAUNCHER_PID")), signal.SIGHUP)
    for ignored in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)


def get_ready() -> RankServer | None:
    """Starts what forks the ranks; a process that was started ahead then waits until it knows what it is to run."""
    open_closed_streams()
    inherited = open_files()
    if sys.argv[1] != AHEAD:
        return start_server(module_of(sys.argv), inherited)
    try:
        server = start_server("esper.worker", inherited)
    except ModuleNotFoundError:  # the launcher will miss it, too, and say so
        os._exit(1)
    command, variables = wait_for_word(Connection(int(sys.argv[2])))
    os.environ.update(variables)
    sys.argv[1:] = command[len(agent_command([])) :]
    set_command_line(command)
    return server


if __name__ == "__main__":
    tie_to_launcher()
    sys.exit(main(get_ready()))
