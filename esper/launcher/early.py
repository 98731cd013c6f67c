"""A SIGTERM in the first seconds of a launcher that is process 1 of a container. Import it before all that takes time.

The kernel gives process 1 no default action for a signal: until a handler stands, a SIGTERM is lost, and the container
trains on until it is killed. So importing this module sets one.
"""

import os
import signal
from types import FrameType

from esper.leyline.errors import Preempted


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"esper: SIGTERM before a run had started\n")
    os._exit(Preempted.exit_code)


def interrupt_on_stop() -> None:
    """From now on that SIGTERM raises KeyboardInterrupt, so that what a start has made is taken back."""
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


if os.getpid() == 1:
    signal.signal(signal.SIGTERM, _end)
