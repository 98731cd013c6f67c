"""Names a missing rank without a run directory, by the last words of ranks in the rendezvous store.

A rank that leaves (it closed, or failed) writes a word. A rank that waits in vain writes so, waits a little for the
others to write the same, and names those that stay silent. A step itself writes nothing: while all goes well only beats
are written, by a thread (`beats`), which also finds a rank that is gone. The store may hang with a stopped rank 0, so
it is asked in a thread with a deadline.
"""

import itertools
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from esper.leyline.errors import LockstepError
from esper.tolaria.ranks.beats import Beats, Place
from esper.tolaria.ranks.heartbeat import LOST, patience
from esper.tolaria.ranks.watchdog import Watchdog

T = TypeVar("T")
_numbers = itertools.count()
ASK_S = 3.0  # deadline of one question to the store


class LastWord:
    """Writes this rank's last word and reads the others'. Does nothing without a store (a rank that is alone).

    Fields:
        rank: this rank.
        world_size: number of ranks.
        step: optimizer step of this rank; written only with a last word.
        tick: control tick of this rank.
        phase: phase of this rank.
        lost: who is gone, as the beats told it; empty while nobody is.
    """

    def __init__(self, store: dist.Store | None, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.step = self.tick = 0
        self.phase = "start"
        self._failed = False
        self._beats: Beats | None = None
        self._watchdog: Watchdog | None = None
        self.lost = ""
        # Ranks make their sessions in the same order, so the number is the same on all of them.
        self._store = None if store is None else dist.PrefixStore(f"esper/words/{next(_numbers)}", store)

    def begin_beats(self, limit_s: float, wait: Callable[[], tuple[str, float]], cut: Callable[[], None]) -> None:
        """Beats for this rank from now on, and watches the others.

        Args:
            limit_s: seconds for which the beat of a rank may stand still.
            wait: returns the collective that this rank is in, "" for none, and since when in `time.monotonic()`.
            cut: ends every wait of this process.
        """
        if self._store is None:
            return

        def end(text: str) -> None:
            self.lost = text
            cut()

        self._beats = Beats(
            self._store.clone(),  # type: ignore[attr-defined]
            self.rank,
            self.world_size,
            limit_s=limit_s,
            place=lambda: Place(self.step, self.phase, *wait()),
            on_lost=end,
        )

    def watch_device(self, limit_s: Callable[[], float], wait: Callable[[], tuple[str, float]]) -> None:
        """Ends a wait for a device that lasts too long though every rank beats; after `begin_beats`.

        Args:
            limit_s: returns the seconds that a wait may last now.
            wait: as for `begin_beats`.
        """
        if self._beats is not None:
            self._watchdog = Watchdog(wait, self.explain, limit_s, self._beats.end)

    def check_lost(self, what: str) -> None:
        """Raises LockstepError once a rank is gone: what a device makes of a group that was cut is rubbish.

        Args:
            what: the collective that would come next.
        """
        if self.lost:
            raise LockstepError(f"{LOST} in {what}: {self.explain()}")

    def mark(self, phase: str, error: str = "") -> None:
        """Notes that this rank enters ``phase``; an error is written at once."""
        self.phase = phase
        if error:
            self._say(f"failed at step {self.step}: {error}")
            self._failed = True
        elif self._failed:  # it goes on after all
            self._say("")
            self._failed = False

    def leave(self, why: str) -> None:
        """Writes the word of a rank that leaves.

        Args:
            why: such as ``closed its session``.
        """
        self._say(f"{why} at step {self.step}")

    def explain(self, patience_s: float | None = None) -> str:
        """One line on who is missing, for an error text.

        Args:
            patience_s: longest wait, in seconds, for the others to say that they wait in vain, too;
                None: `patience`.
        """
        self._say(f"{LOST}: {self.lost}" if self.lost else LOST)
        if self.lost:
            return self.lost
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        until = time.monotonic() + (patience() if patience_s is None else patience_s)
        while True:
            words = {rank: self._read(rank) for rank in others}
            causes = {rank: word for rank, word in words.items() if word and not word.startswith(LOST)}
            told = [word.removeprefix(f"{LOST}: ") for word in words.values() if word.startswith(f"{LOST}: ")]
            silent = [rank for rank, word in words.items() if not word]
            if causes or told or not silent or time.monotonic() >= until:
                break
            time.sleep(0.05)
        if causes:
            return "; ".join(f"rank {rank} {word}" for rank, word in causes.items())
        if told:
            return told[0]
        here = f"while rank {self.rank} waited in {self.phase} at step {self.step}"
        if silent:
            return f"rank {', '.join(map(str, silent))} did not come, {here}"
        return f"every rank says the same, {here}: the network between them may be cut"

    def close(self) -> None:
        """Ends the beats and the watchdog; safe to call twice."""
        if self._watchdog is not None:
            self._watchdog.close()
        if self._beats is not None:
            self._beats.close()

    def _say(self, text: str) -> None:
        store = self._store
        if store is not None:
            self._ask(lambda: store.set(str(self.rank), text[:300]), None)

    def _read(self, rank: int) -> str:
        store, key = self._store, str(rank)
        if store is None:
            return ""
        return self._ask(lambda: store.get(key).decode(errors="replace") if store.check([key]) else "", "")

    @staticmethod
    def _ask(question: Callable[[], T], otherwise: T) -> T:
        answer = [otherwise]

        def ask() -> None:
            try:
                answer[0] = question()
            except (RuntimeError, dist.DistError):
                return

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(ASK_S)
        return answer[0]
