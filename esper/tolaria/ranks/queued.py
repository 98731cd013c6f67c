"""Where a device is in its queue.

Work on a GPU is queued: the CPU is out of a collective at once, and waits for a peer that is gone wherever it reads a
result next, in the user's own code too. So an event is queued behind each collective; while the device has not reached
it, this rank is still in that collective.
"""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch


class Queued:
    """The latest collective in a device's queue.

    Args:
        make: makes an event, with ``record`` and ``query``.
    """

    def __init__(self, make: Callable[[], Any] = torch.cuda.Event) -> None:
        self._make = make
        self._latest: tuple[str, float, Any] | None = None

    def note(self, what: str) -> None:
        """Queues an event behind the collective called ``what``."""
        event = self._make()
        event.record()
        self._latest = what, time.monotonic(), event

    def wait(self) -> tuple[str, float]:
        """The collective that the device has not passed, "" if there is none, and the `time.monotonic()` since which it
        is queued. May be called from another thread."""
        latest = self._latest
        with contextlib.suppress(RuntimeError):  # the device has failed: then the main thread has an error, too
            if latest is not None and not latest[2].query():
                return latest[:2]
        return "", 0.0
