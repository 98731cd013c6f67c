"""A thread that ends a rank which waits on a device for a peer that is gone.

Work on a GPU is queued. So the CPU does not wait in a collective, where a timeout would raise, but later, wherever a
result is first read; and NCCL's own watchdog ends the process without a message. So a thread watches this rank's own
heartbeat. If the rank stays longer than the groups' limit in a phase that waits for peers, the thread reads from the
others' marks who is missing, and hands that text on. On CPUs gloo raises by itself and no watchdog is needed.

In a user's own loop being late is no fault, so the beats keep watch there (see `beats`): while `World.busy` names a
collective that the device has not passed, a rank whose beat stands still ends the wait.
"""

import threading
import time
from collections.abc import Callable

from esper.tolaria.ranks.heartbeat import Heartbeat

WAITING = frozenset({"forward", "backward", "step", "buffers", "observe", "commit", "rewrap", "save-commit"})


class Watchdog:
    """Calls ``on_stuck`` once, from its own thread, when this rank waits too long.

    Args:
        heartbeat: of this rank.
        limit_s: returns the seconds that a phase of `WAITING` may last now.
        on_stuck: called with one line of text.
        poll_s: seconds between two looks.
    """

    def __init__(
        self, heartbeat: Heartbeat, limit_s: Callable[[], float], on_stuck: Callable[[str], None], poll_s: float = 0.5
    ) -> None:
        self._heartbeat, self._limit_s, self._on_stuck, self._poll_s = heartbeat, limit_s, on_stuck, poll_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="esper-watchdog", daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(self._poll_s):
            phase, since = self._heartbeat.phase, self._heartbeat.marked_at
            limit = self._limit_s()
            if phase in WAITING and time.monotonic() - since > limit:
                text = self._heartbeat.explain()
                if self._heartbeat.phase == phase and self._heartbeat.marked_at == since:
                    self._on_stuck(f"waited {limit:.0f} s in {phase}: {text}")
                    return

    def close(self) -> None:
        """Ends the thread; safe to call twice."""
        self._over.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()
