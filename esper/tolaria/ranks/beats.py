"""Beats of ranks in the rendezvous store: tells a rank that is late from one that is gone.

In a user's own loop a rank may rightly be late for minutes: it evaluates alone, writes a file, loads data. It still
beats, from a thread, so the others wait for it and say for whom. A rank that is stopped or cut off beats no more; that
ends the run by name, within the limit, wherever the others wait.

    beat     each rank writes (count, step, phase, what it waits in) every tenth of the limit
    watch    each rank reads the others': in a world of up to `ALWAYS` ranks always, in a larger one while it waits

A wait in gloo cannot be interrupted, so the one who ends the run cuts its own connections (see `sockets`). A thread
that does not ask the store keeps the time, because a store whose host is stopped never answers.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from esper.leyline.errors import LockstepError

ALWAYS = 64
TORN_S = 10.0  # after the connections are cut, until a process that does not notice is ended
STEPPING = ("forward", "backward", "step")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is.

    Fields:
        step: its optimizer step.
        phase: the phase that it entered last.
        waiting: the collective that it is in; empty if it is in none.
        since: when it came into it, in this process's `time.monotonic()`; 0 for another rank.
        left: it has left the session.
    """

    step: int
    phase: str
    waiting: str = ""
    since: float = 0.0
    left: bool = False

    def __str__(self) -> str:
        return f"in {self.waiting or self.phase} at step {self.step}"


@dataclass(slots=True)
class Seen:
    """What is known of another rank: its newest beat, when it came, and since when its place is the same."""

    beat: int
    place: Place
    at: float
    since: float


class Beats:
    """Beats for this rank and watches the others, from two threads.

    Args:
        store: the rendezvous store; it is cloned, so that no other wait in it holds up a beat.
        rank: this rank.
        world_size: number of ranks.
        limit_s: seconds for which the beat of a rank may stand still.
        place: returns where this rank is.
        on_lost: called once, with one line, when a rank is gone; it ends the waits of this process.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        *,
        limit_s: float,
        place: Callable[[], Place],
        on_lost: Callable[[str], None],
    ) -> None:
        self._store, self.rank, self._limit_s, self._place, self._on_lost = store, rank, limit_s, place, on_lost
        self._others = [other for other in range(world_size) if other != rank]
        self._always = world_size <= ALWAYS
        self._every_s = limit_s / 10
        self._seen: dict[int, Seen] = {}
        self._answered = self._began = time.monotonic()
        self._waits_since, self._waits_in, self._warn_at = 0.0, ("", 0.0), 1.0
        self._over = threading.Event()
        self._lock = threading.Lock()
        threads = {"esper-beat": self._beat, "esper-watch": self._watch}
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in threads.items()]
        for thread in self._threads:
            thread.start()

    # beating ------------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        count = 0
        while not self._over.is_set():
            count += 1
            place = self._place()
            try:
                self._write(count, place)
                if self._always or place.waiting:
                    self._read()
                self._answered = time.monotonic()
            except (RuntimeError, dist.DistError):  # the watch counts the time since the last answer
                pass
            self._over.wait(self._every_s)

    def _write(self, count: int, place: Place) -> None:
        value = json.dumps([count, place.step, place.phase, place.waiting, place.left])
        self._store.set(f"beat/{self.rank}", value)

    def _read(self) -> None:
        keys = [f"beat/{other}" for other in self._others]
        if not self._store.check(keys):  # someone has not begun
            keys = [key for key in keys if self._store.check([key])]
        values = self._store.multi_get(keys) if keys else []
        now = time.monotonic()
        with self._lock:
            for key, raw in zip(keys, values, strict=True):
                count, step, phase, waiting, left = json.loads(raw)
                place, known = Place(step, phase, waiting, left=left), self._seen.get(int(key[5:]))
                if known is None:
                    self._seen[int(key[5:])] = Seen(count, place, now, now)
                elif known.beat != count:
                    since = known.since if known.place == place else now
                    self._seen[int(key[5:])] = Seen(count, place, now, since)

    # watching -----------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(self._every_s / 2):
            place, now = self._place(), time.monotonic()
            if (place.waiting, place.since) != self._waits_in:
                self._waits_in, self._waits_since = (place.waiting, place.since), now
                self._warn_at = self._limit_s
                if not self._always:  # what was read before says nothing of the time in between
                    with self._lock:
                        self._seen.clear()
            if not place.waiting:
                continue
            text = self._describe_loss(place, now)
            if text:
                self.end(text, place)
                return
            if now - self._waits_since > self._warn_at:
                self._warn(place, now - self._waits_since)
                self._warn_at *= 2

    def _describe_loss(self, place: Place, now: float) -> str:
        """One line on who is gone, or can never meet this rank; empty if nobody is."""
        if now - self._answered > self._limit_s:
            silent_s = now - self._answered
            return f"the rendezvous store has not answered for {silent_s:.0f} s: its host is stopped, or cut off"
        unseen = max(self._began, self._waits_since)
        with self._lock:
            seen = {rank: self._seen.get(rank) or Seen(0, Place(0, "start"), unseen, unseen) for rank in self._others}
        gone = [
            f"rank {rank} has not beaten for {now - other.at:.0f} s (stopped, or cut off), last seen {other.place}"
            for rank, other in sorted(seen.items())
            if not other.place.left and now - other.at > self._limit_s
        ]
        if gone:
            return "; ".join(gone)
        waited = now - self._waits_since > self._limit_s
        apart = [
            rank
            for rank, other in sorted(seen.items())
            if waited
            and {place.phase, other.place.phase} in ({"save", phase} for phase in STEPPING)
            and other.place.waiting
            and other.place.step == place.step
            and now - other.since > self._limit_s
        ]
        if apart:
            saving = place.phase == "save"
            here, there = ("session.save", "did not call it and is") if saving else ("a step", "is")
            return f"rank {self.rank} is in {here}, rank {apart[0]} {there} {seen[apart[0]].place}: " + (
                "every rank must call session.save (and state_dict); rank 0 alone writes"
            )
        return ""

    def _warn(self, place: Place, waited_s: float) -> None:
        """Prints for whom this rank waits; the lowest of those that wait speaks."""
        with self._lock:
            seen = sorted(self._seen.items())
        late = [(rank, other.place) for rank, other in seen if not other.place.waiting and not other.place.left]
        late = late or [(rank, other.place) for rank, other in seen if not other.place.left]  # all in one collective
        waiting = [rank for rank, other in seen if other.place.waiting]
        if min([self.rank, *waiting]) == self.rank:
            names = ", ".join(f"rank {rank} ({where})" for rank, where in late)
            print(
                f"esper: rank {self.rank} has waited {waited_s:.0f} s {place} for {names}: alive, and waited for",
                file=sys.stderr,
                flush=True,
            )

    def end(self, text: str, place: Place | None = None) -> None:
        """Ends the wait of this rank by an error; or the process, if that wait cannot be ended.

        Args:
            text: one line on who is missing.
            place: where this rank waits; None to look.
        """
        place = self._place() if place is None else place
        # In a thread: a device's group may hang in its end, or fail in it.
        threading.Thread(target=self._on_lost, args=(text,), name="esper-cut", daemon=True).start()
        until = time.monotonic() + TORN_S
        while time.monotonic() < until:
            if self._over.wait(0.1):
                return
            now = self._place()
            if not now.waiting or (now.waiting, now.since) != (place.waiting, place.since):
                return
        print(f"esper: {text}", file=sys.stderr, flush=True)
        os._exit(LockstepError.exit_code)

    def close(self) -> None:
        """Says that this rank leaves, and ends the threads; safe to call twice."""
        if self._over.is_set():
            return
        self._over.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(self._every_s)
        if not self._threads[0].is_alive():  # it may hang in the store
            with contextlib.suppress(RuntimeError, dist.DistError):
                self._write(-1, Place(self._place().step, "", left=True))
