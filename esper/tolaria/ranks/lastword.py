"""Who is missing, where there is no run directory: the last words of ranks, in the store that they met at.

A rank that goes (it closed, or failed) leaves a word. One that waits in vain says so, waits a little for the others to
say the same, and names those who stay silent. Nothing is written while all goes well, so a step costs nothing. The
store may itself hang with a stopped rank 0, so it is asked in a thread with a deadline.
"""

import itertools
import threading
import time
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from esper.tolaria.ranks.heartbeat import LOST, PATIENCE_S

T = TypeVar("T")
_numbers = itertools.count()
ASK_S = 3.0  # deadline of one question to the store


class LastWord:
    """This rank's word, and the others'. Does nothing without a store (a rank that is alone).

    Fields:
        rank, world_size: this rank's place. step, tick, phase: where it is; kept here, told only at the end.
    """

    def __init__(self, store: dist.Store | None, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.step = self.tick = 0
        self.phase = "start"
        # Ranks make their sessions in the same order, so the number is the same on all of them.
        self._store = None if store is None else dist.PrefixStore(f"esper/words/{next(_numbers)}", store)

    def mark(self, phase: str, error: str = "") -> None:
        """Notes that this rank enters ``phase``; an error is told at once."""
        self.phase = phase
        if error:
            self._say(f"failed at step {self.step}: {error}")

    def leave(self, why: str) -> None:
        """The word of a rank that goes: ``closed its session``."""
        self._say(f"{why} at step {self.step}")

    def explain(self, patience_s: float = PATIENCE_S) -> str:
        """One line on who is missing, for an error text.

        Args:
            patience_s: longest wait for the others to say that they, too, wait in vain.
        """
        self._say(LOST)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        until = time.monotonic() + patience_s
        while True:
            words = {rank: self._read(rank) for rank in others}
            told = {rank: word for rank, word in words.items() if word and word != LOST}
            silent = [rank for rank, word in words.items() if not word]
            if told or not silent or time.monotonic() >= until:
                break
            time.sleep(0.05)
        if told:
            return "; ".join(f"rank {rank} {word}" for rank, word in told.items())
        here = f"while rank {self.rank} waited in {self.phase} at step {self.step}"
        if silent:
            return f"rank {', '.join(map(str, silent))} did not come, {here}"
        return f"every rank says the same, {here}: the network between them may be cut"

    def close(self) -> None:
        """Nothing is held."""

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
        found = [otherwise]

        def ask() -> None:
            try:
                found[0] = question()
            except (RuntimeError, dist.DistError):
                return

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(ASK_S)
        return found[0]
