"""Stop signals of a rank: the first asks it to save at its next tick, and only a person who insists ends it at once.

One stop reaches a rank several times. Slurm and systemd signal every process of a job, a terminal every process of its
group, and a torchrun typed by hand sends its workers the signal that it got itself; a torchrun that dies of a signal
has the kernel send SIGHUP. Our launcher, too, sends SIGUSR1 while Slurm's SIGTERM may be on its way. So these repeats
must not end a rank that is about to save:

    SIGUSR1             never insists
    SIGINT              the third signal does: one Ctrl-C is two of them under torchrun, and the next one is meant
    SIGHUP              insists under our launcher, which sends it through the agent to end the ranks; else as SIGTERM
    any, SIGTERM too    insists once ``grace_s`` is over
"""

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from esper.run.ending import SUPERVISED

_ECHOES = 2  # signals of one Ctrl-C: the terminal's own, and torchrun's
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


class StopHandlers:
    """Handles the stop signals of this process, from `install` on.

    Args:
        ask: asks the run to stop; called at each signal.
        grace_s: seconds after the first signal from which on any other than SIGUSR1 ends the process.
    """

    def __init__(self, ask: Callable[[], None], grace_s: float) -> None:
        self._ask, self._grace_s = ask, grace_s
        self._count, self._first_at = 0, 0.0

    def install(self) -> None:
        """Sets the handlers; call it in the main thread."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def insists(self, number: int, count: int) -> bool:
        """Whether the ``count``-th signal, which has just come, asks for the end at once."""
        if count == 1 or number == signal.SIGUSR1:
            return False
        if number == signal.SIGHUP and SUPERVISED in os.environ:
            return True
        if number == signal.SIGINT and count > _ECHOES:
            return True
        return time.monotonic() - self._first_at >= self._grace_s

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._count += 1  # before all else: the next signal's handler may run within this one
        count = self._count
        if count == 1:
            self._first_at = time.monotonic()
        self._ask()
        if self.insists(number, count):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
