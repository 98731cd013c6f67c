"""A thread that ends a rank which waits on a device for a peer that does not come.

Work on a GPU is queued. So the CPU does not wait in a collective, where a timeout would raise, but later, wherever a
result is first read; and NCCL's own watchdog ends the process without a message. So a thread watches where this rank
waits. If it stays longer than the groups' limit in one wait for peers, the thread reads from the others' words who is
missing, and hands that text on. On CPUs gloo raises by itself and no watchdog is needed.

    a run      a wait is a phase of `WAITING`, marked in the heartbeat; the rank ends at once
    a session  a wait is a collective that this rank is in, or that its device has not passed (`World.wait`). The groups
               are cut, so that the user's loop has an error; a rank that it does not reach ends (`Beats.end`)

In a user's own loop being late is no fault, so there the limit is torch's own. A rank that is gone is found sooner,
by the beats (see `beats`).
"""

import threading
import time
from collections.abc import Callable

from esper.tolaria.ranks.heartbeat import Heartbeat

WAITING = frozenset({"forward", "backward", "step", "buffers", "observe", "commit", "rewrap", "save-commit"})


def phase_that_waits(heartbeat: Heartbeat) -> tuple[str, float]:
    """The phase of `WAITING` that a rank of a run is in, "" if it is in none, and since when in `time.monotonic()`.

    Args:
        heartbeat: of this rank.
    """
    phase = heartbeat.phase
    return phase if phase in WAITING else "", heartbeat.marked_at


class Watchdog:
    """Calls ``on_stuck`` once, from its own thread, when this rank waits too long.

    Args:
        wait: returns what this rank waits in, "" for nothing, and since when in `time.monotonic()`.
        explain: returns one line on who is missing; it may take a few seconds.
        limit_s: returns the seconds that a wait may last now.
        on_stuck: called with one line of text.
        poll_s: seconds between two looks.
    """

    def __init__(
        self,
        wait: Callable[[], tuple[str, float]],
        explain: Callable[[], str],
        limit_s: Callable[[], float],
        on_stuck: Callable[[str], None],
        poll_s: float = 0.5,
    ) -> None:
        self._wait, self._explain = wait, explain
        self._limit_s, self._on_stuck, self._poll_s = limit_s, on_stuck, poll_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="esper-watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(self._poll_s):
            (what, since), limit = self._wait(), self._limit_s()
            if what and time.monotonic() - since > limit:
                text = self._explain()
                if self._wait() == (what, since):
                    self._on_stuck(f"waited {limit:.0f} s in {what}: {text}")
                    return

    def close(self) -> None:
        """Ends the thread; safe to call twice."""
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
