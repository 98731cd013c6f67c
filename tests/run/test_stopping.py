"""Which stop signals end a rank at once; real signals to a process of its own."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import pytest

from esper.run.ending import SUPERVISED
from esper.run.stopping import StopHandlers
from tests.support.dist import rank_context


def wait_for_signals(line: Connection, grace_s: float, supervised: bool) -> None:
    """In a process of its own: says ``asked`` at each signal, and ``alive`` at a word; ends with the line.

    A signal that comes between Python's last look and a read that blocks is handled only when that read returns, so it
    waits a moment at a time.
    """
    os.environ.pop(SUPERVISED, None)
    if supervised:
        os.environ[SUPERVISED] = "1"
    StopHandlers(lambda: line.send("asked"), grace_s).install()
    line.send("ready")
    while True:
        if line.poll(0.05):
            try:
                line.recv()
            except EOFError:
                return
            line.send("alive")


INT, TERM, HUP, USR1 = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


@pytest.mark.parametrize(
    ("signals", "grace_s", "supervised", "ended_by"),
    [
        ([TERM, TERM], 60.0, False, None),  # Slurm to every process, and the agent's echo
        ([TERM, TERM, HUP], 60.0, False, None),  # and the agent has died meanwhile
        ([USR1, HUP], 60.0, False, None),  # torchrun dies of SIGUSR1
        ([HUP, HUP, HUP], 60.0, False, None),  # a terminal that was closed
        ([USR1, TERM], 60.0, True, None),  # our launcher was faster than Slurm
        ([INT, INT], 60.0, False, None),  # one Ctrl-C
        ([INT, INT, INT], 60.0, False, INT),  # two
        ([USR1, HUP], 60.0, True, HUP),  # our launcher insists
        ([TERM, TERM], 0.0, False, TERM),  # the grace is over
        ([USR1, USR1, USR1], 0.0, True, None),
    ],
)
def test_an_echo_does_not_insist(signals: list[int], grace_s: float, supervised: bool, ended_by: int | None) -> None:
    context = rank_context()
    ours, theirs = context.Pipe()
    child: multiprocessing.Process = context.Process(target=wait_for_signals, args=(theirs, grace_s, supervised))
    child.start()
    theirs.close()
    try:
        assert ours.recv() == "ready"
        for number in signals:
            assert child.pid is not None
            os.kill(child.pid, number)
            assert ours.recv() == "asked", "each signal is handled before the next one comes"
        if ended_by is None:
            ours.send("go on")
            assert ours.recv() == "alive"
        ours.close()
        child.join()
        assert child.exitcode == (0 if ended_by is None else -ended_by)
    finally:
        child.kill()
        child.join()
