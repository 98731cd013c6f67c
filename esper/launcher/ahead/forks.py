"""Ranks that begin with torch loaded: a process that has imported what a rank needs forks them when torchrun asks.

    launcher -> agent (torchrun) -> rank server     has imported, and waits: one thread, no CUDA, no process group
                      |                  | forks
                      +-----> ranks <----+          each adopted by the agent as its own child

A rank that Python starts imports for three seconds, and one that torchrun restarts does so again; a fork takes some
milliseconds. The server is forked off the agent before the agent has a thread of its own, and is never more than what
it has imported, so the first rank and one that is restarted after a week begin alike.

A forked rank is what torchrun would have started: its parent is the agent (which waits for it, and with which it dies),
it leads a session of its own, has the environment that torchrun made for it and no other, and runs the module as
``__main__``. `ps` shows the module, its arguments and the rank. Not taken over is what the agent had inherited: RUN's
lock, above all. The process between server and rank ends at once, so that the kernel gives its child to the agent,
which adopts orphans for that moment (https://man7.org/linux/man-pages/man2/PR_SET_CHILD_SUBREAPER.2const.html).

Linux only, like the launcher.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from esper.launcher.ahead.server import preload, serve
from esper.nissa.lane import say
from esper.run import parent

LOADED = ("OMP_NUM_THREADS", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")  # read when a process begins
ROOM = "_" * 400  # a process cannot show more words than it was started with: this is for those that it shows later
_POLL_S = 0.02


def open_files() -> set[int]:
    """The descriptors of this process, without the three streams."""
    return {fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2 and Path(f"/proc/self/fd/{fd}").exists()}


class ForkedRank:
    """A rank that the server has forked, for torchrun to wait for, as it would for a `subprocess.Popen`.

    Fields:
        pid: its process id; it is a child of this process.
        returncode: as Popen has it; None while it runs.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def send_signal(self, signum: int) -> None:
        """Sends it a signal."""
        os.kill(self.pid, signum)

    def poll(self) -> int | None:
        """Returns the exit code, negative for a signal; None while the rank runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the end of the rank; returns its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs after ``timeout`` seconds.
        """
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(f"rank process {self.pid}", timeout or 0.0)
            time.sleep(_POLL_S)
        return code


class RankServer:
    """The other end of the server: the agent's, say.

    Args:
        connection: to the server.
        pid: the server's process id.
        process: the server, if it was started as a process of its own.
    """

    def __init__(self, connection: Connection, pid: int, process: "subprocess.Popen[bytes] | None" = None) -> None:
        self._connection, self.pid, self._process = connection, pid, process
        self._lock = threading.Lock()

    def start(
        self, module: str, arguments: Sequence[str], environment: Mapping[str, str], output: Path | None = None
    ) -> ForkedRank:
        """Starts a rank.

        Args:
            module: what it runs as ``__main__``.
            arguments: its ``sys.argv`` after the first.
            environment: all of its variables.
            output: file to which its output and its errors are added; None: they go where the server's go.

        Raises:
            OSError: the server is gone, or cannot fork.
        """
        words = {"module": module, "arguments": list(arguments), "environment": dict(environment)}
        with self._lock:
            parent.adopt_orphans(True)
            try:
                self._connection.send_bytes(json.dumps({**words, "output": output and str(output)}).encode())
                pid = int(self._connection.recv_bytes())
            except EOFError:
                raise OSError("the process that forks ranks is gone") from None
            finally:
                parent.adopt_orphans(False)
        if pid <= 0:
            raise OSError(-pid, f"a rank cannot be forked ({os.strerror(-pid)})")
        return ForkedRank(pid)

    def close(self) -> None:
        """Ends the server; ranks that it has forked go on."""
        self._connection.close()
        if self._process is not None:
            self._process.wait()


def launch_server(module: str, environment: Mapping[str, str]) -> RankServer:
    """Starts a server as a process of its own, for one that has threads, or other variables than its ranks need.

    Args:
        module: what ranks will run.
        environment: the server's variables; what libraries read when they are loaded holds for the ranks, too.
    """
    ours, theirs = Pipe()
    words = [sys.executable, "-m", "esper.launcher.ahead.server", str(theirs.fileno()), module, str(os.getpid()), ROOM]
    with theirs:
        process = subprocess.Popen(words, env=dict(environment), pass_fds=(theirs.fileno(),), start_new_session=True)
    return RankServer(ours, process.pid, process)


def start_server(module: str, inherited: Iterable[int] = ()) -> RankServer | None:
    """Imports a module and what its ranks need; forks the server off this process.

    In a rank this function does not return: the rank's program ends with `SystemExit`.

    Args:
        module: what ranks will run.
        inherited: descriptors that are for this process alone.

    Returns:
        None if ranks must be started by Python instead, see `preload`.
    """
    if not preload(module):
        return None
    ours, theirs = Pipe()
    agent = os.getpid()
    pid = os.fork()
    if pid:
        theirs.close()
        return RankServer(ours, pid)
    ours.close()
    for descriptor in inherited:
        os.close(descriptor)
    run_rank = serve(theirs, agent)
    run_rank()
    sys.exit(0)


def fork_ranks(server: RankServer) -> None:
    """From now on a torchrun in this process has its workers forked by the server."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    execute = SubprocessHandler._popen

    def fork(self: Any, args: tuple[str, ...], env: dict[str, str]) -> Any:
        python, *words = args
        plain = self._stdout is None and self._stderr is None  # else into files, see torchrun --redirects
        if plain and python == sys.executable and words[:2] == ["-u", "-m"]:  # no numactl before it
            try:
                return server.start(words[2], words[3:], env)
            except OSError as error:
                say(f"{error}; ranks are started by Python and import for themselves")
        return execute(self, args, env)

    SubprocessHandler._popen = fork  # type: ignore[method-assign]
