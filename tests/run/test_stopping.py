"""Which stop signals end a rank at once; real signals to a process of its own."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from esper.run.ending import SUPERVISED

# A signal that comes between Python's last look and a read that blocks is handled only when that read returns, so the
# child waits a moment at a time.
SCRIPT = """
import select, sys
from esper.run.stopping import StopHandlers
StopHandlers(lambda: print("asked", flush=True), float(sys.argv[1])).install()
print("ready", flush=True)
while True:
    if select.select([sys.stdin], [], [], 0.05)[0]:
        if not sys.stdin.readline():
            break
        print("alive", flush=True)
"""
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
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    variables.pop(SUPERVISED, None)
    if supervised:
        variables[SUPERVISED] = "1"
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(grace_s)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=variables,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for number in signals:
            child.send_signal(number)
            assert child.stdout.readline() == "asked\n", "each signal is handled before the next one comes"
        if ended_by is None:
            child.stdin.write("\n")
            child.stdin.flush()
            assert child.stdout.readline() == "alive\n"
            child.stdin.close()
        assert child.wait() == (0 if ended_by is None else -ended_by)
