"""The process that forks ranks: imports what they need, and then only waits for requests; see `forks`.

As a process of its own it is ``python -m esper.launcher.ahead.server FD MODULE CLIENT``.
"""

import esper.run.leaving  # noqa: F401 - first, as it says, since ranks are forked off this process

# isort: split

import ctypes
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from esper.nissa.lane import say
from esper.run import parent

PRELOADED = ("torch._dynamo",)  # what the first optimizer of a process imports, for a second


def preload(module: str) -> bool:
    """Imports a module and what its ranks need; returns whether this process may then fork them.

    If not, which one line says, an import has started a thread: what threads hold while a process forks is never given
    back in the child.
    """
    variables = dict(os.environ)
    importlib.import_module(module)
    if "torch" in sys.modules:
        for name in PRELOADED:
            importlib.import_module(name)
    for name in os.environ.keys() - variables.keys():  # a rank's variables are torchrun's, not what an import adds
        del os.environ[name]
    if (threads := len(os.listdir("/proc/self/task"))) > 1:
        say(f"importing {module} has started {threads - 1} threads, so ranks are not forked but import for themselves")
        return False
    gc.freeze()  # the collector leaves what is loaded alone, so its memory stays shared with the ranks
    return True


def serve(connection: Connection, agent: int) -> Callable[[], None]:
    """Forks ranks until the agent is gone, with which the server ends; returns, in a rank only, what it runs."""
    parent.die_with_parent(agent, signal.SIGKILL)
    while True:
        try:
            words: dict[str, Any] = json.loads(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)
        ready, said = os.pipe()
        try:
            between = os.fork()
        except OSError as error:
            os.close(ready)
            os.close(said)
            connection.send_bytes(str(-(error.errno or 1)).encode())
            continue
        if between == 0:
            between = os.getpid()
            _fork_once_more()
            os.close(ready)
            connection.close()
            return lambda: _become_rank(said, between, agent, **words)
        os.close(said)
        answer = os.read(ready, 32)  # nothing if the rank could not be forked
        os.close(ready)
        _, status = os.waitpid(between, 0)  # from here on the rank is the agent's child
        failed = os.waitstatus_to_exitcode(status) or 1
        connection.send_bytes(answer or str(-failed).encode())


def _fork_once_more() -> None:
    """In the process between server and rank: forks the rank and ends; returns in the rank."""
    try:
        rank = os.fork()
    except OSError as error:
        os._exit(error.errno or 1)
    if rank:
        os._exit(0)


def _become_rank(
    said: int,
    between: int,
    agent: int,
    *,
    module: str,
    arguments: list[str],
    environment: dict[str, str],
    output: str | None,
) -> None:
    """Runs a module in this forked process, as ``python -m`` would in a new one that the agent has started.

    Args:
        said: where the agent hears this process's id.
        between: the process that forked this one, and is about to end.
        agent: the process that adopts it then.
        module, arguments, environment, output: see `RankServer.start`.
    """
    os.setsid()  # before the agent knows it: torchrun sends signals to a rank's group
    os.write(said, str(os.getpid()).encode())
    os.close(said)
    if output is not None:
        log = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    while os.getppid() == between:
        time.sleep(0.0005)
    parent.PARENT = agent
    # torchrun catches these two, and what is caught is the default again in a process that it starts; the server may
    # ignore them, as what a shell runs in the background does.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    shown = [sys.executable, "-m", module, *arguments]
    set_command_line([*shown, *(f"{name}={environment[name]}" for name in ("RANK",) if name in environment)])
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)  # it runs as __main__; imported by its name it would be there twice
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def set_command_line(words: Sequence[str]) -> None:
    """Overwrites the words that the kernel shows for this process, as far as there is room for them."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end; 0 where the kernel keeps them to itself
    text = b"\0".join(word.encode(errors="surrogateescape") for word in words)[: max(end - start - 1, 0)]
    if end > start:
        ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    descriptor, module, client = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    parent.die_with_parent(client, signal.SIGKILL)
    if not preload(module):
        sys.exit(1)
    run_rank = serve(Connection(descriptor), client)
    run_rank()
