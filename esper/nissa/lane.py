"""A bounded queue with a thread of its own, so that a slow disk or a dead server never makes training wait.

    emit -> put --[ queue ]--> thread -> write(batch, urgent)

Ordinary items wait up to ``linger_s`` and are written in batches. Priority items wake the thread at once, and have
`RESERVE` places more. If there is no place an item is refused, and the owner counts it; so the queue is bounded,
whatever hangs. Only items that must be kept (there are few) find a place in any case. Order is kept across all kinds.
"""

import contextlib
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
RESERVE = 8192  # places in a queue that only priority items may take


def say(text: str) -> None:
    """Writes one line to stderr; does nothing if stderr is gone."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(f"esper: {text}\n")
        sys.stderr.flush()


class Lane(Generic[T]):
    """Queue and thread of one sink.

    Args:
        name: name of the thread.
        write: takes a batch and whether it is urgent; runs only on the lane's thread and must not raise.
        capacity: ordinary items that may wait.
        linger_s: seconds that an ordinary item may wait for others.
    """

    def __init__(
        self, name: str, write: Callable[[list[T], bool], None], *, capacity: int = 8192, linger_s: float = 0.2
    ) -> None:
        self._write, self._capacity, self._linger_s = write, capacity, linger_s
        self._queue: list[T] = []
        self._taken = self._done = 0
        self._urgent = self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T, *, priority: bool = False, keep: bool = False) -> bool:
        """Queues an item; returns False if the queue is full or closed and refuses it.

        Args:
            item: the item.
            priority: wakes the thread, and may take the reserve.
            keep: even a full queue takes it.
        """
        with self._changed:
            places = self._capacity + (RESERVE if priority else 0)
            if self._closing or (not keep and len(self._queue) >= places):
                return False
            self._queue.append(item)
            self._taken += 1
            self._urgent |= priority
            self._changed.notify_all()
            return True

    def flush(self, timeout_s: float) -> bool:
        """Waits until all items taken so far went through ``write``; returns False if ``timeout_s`` passed first."""
        with self._changed:
            target, self._urgent = self._taken, bool(self._queue)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: self._done >= target, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Lets the thread finish the queue and end; returns False if it was still busy after ``timeout_s``."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    return
                self._changed.wait_for(self._due, self._linger_s)
                batch, self._queue = self._queue, []
                urgent, self._urgent = self._urgent, False
            self._write(batch, urgent)
            with self._changed:
                self._done += len(batch)
                self._changed.notify_all()

    def _due(self) -> bool:
        return self._urgent or self._closing or len(self._queue) * 2 >= self._capacity
