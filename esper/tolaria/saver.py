"""Saving from a running engine: one save in flight, its fate told in a later commit, so that it adds no collective."""

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from esper.leyline.errors import CheckpointError
from esper.leyline.events import CheckpointSaved, Event, Fault
from esper.tolaria.checkpoint import CheckpointStore, rank_file
from esper.tolaria.wire import RankWord, SaveWord
from esper.tolaria.world import World


@dataclass(slots=True)
class _Flight:
    step: int
    tick: int
    score: float | None
    word: SaveWord
    error: str
    ms: float


class Saver:
    """Writes this rank's share of a save and settles it once all ranks have spoken.

    Args:
        store: where. world: for the last, synchronous save.
    """

    def __init__(self, store: CheckpointStore, world: World) -> None:
        self.store, self.world = store, world
        self._flight: _Flight | None = None

    @property
    def word(self) -> SaveWord:
        """What this rank says of the save in flight."""
        return SaveWord.NONE if self._flight is None else self._flight.word

    def begin(
        self, step: int, tick: int, score: float | None, common: dict[str, Any] | None, own: dict[str, Any]
    ) -> None:
        """Writes this rank's file, and on rank 0 what is common. A disk that says no becomes this rank's word."""
        began = time.perf_counter()
        word, text = SaveWord.WRITTEN, ""
        try:
            if common is not None:
                self.store.write(step, "state.pt", common)
            self.store.write(step, rank_file(self.world.rank), own)
        except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
            word, text = SaveWord.FAILED, f"{type(error).__name__}: {str(error).splitlines()[0]}"
        self._flight = _Flight(step, tick, score, word, text, 1e3 * (time.perf_counter() - began))

    def settle(self, ranks: tuple[RankWord, ...], axes: dict[str, int]) -> Event | None:
        """After a commit: rank 0 commits the save in flight if every rank wrote its share, else it is abandoned.

        Returns what this rank has to tell: on rank 0 the outcome, on another its own failure.
        """
        flight, self._flight = self._flight, None
        if flight is None:
            return None
        where = str(self.store.path(flight.step))
        if self.world.rank != 0:
            what = f"save of step {flight.step} failed here: {flight.error}"
            return Fault(**axes, what=what, where=where) if flight.word is SaveWord.FAILED else None
        failed = [rank for rank, word in enumerate(ranks) if word.save is not SaveWord.WRITTEN]
        if not failed:
            began = time.perf_counter()
            try:
                size = self.store.commit(flight.step, tick=flight.tick, world_size=self.world.size, score=flight.score)
                ms = flight.ms + 1e3 * (time.perf_counter() - began)
                return CheckpointSaved(**axes, saved_step=flight.step, path=where, bytes=size, save_ms=ms)
            except (OSError, CheckpointError) as error:
                failed, flight.error = [0], str(error)
        self.store.abandon(flight.step)
        text = f"save of step {flight.step} failed on rank {', '.join(map(str, failed))}"
        return Fault(
            **axes, what=f"{text}: {flight.error or 'see that rank'}; older checkpoints are untouched", where=where
        )

    def finish(self, axes: dict[str, int]) -> Event | None:
        """Settles the save in flight synchronously: the last save of a run.

        Raises:
            CheckpointError: it failed; the text names the newest checkpoint that there is.
        """
        if self._flight is None:
            return None
        step, word = self._flight.step, torch.zeros(self.world.size, dtype=torch.int64)
        word[self.world.rank] = int(self.word)
        self.world.all_reduce(word, dist.ReduceOp.MAX, what="save", on="default")
        event = self.settle(tuple(RankWord(save=SaveWord(value)) for value in word.tolist()), axes)
        committed = torch.tensor([int(isinstance(event, CheckpointSaved))], dtype=torch.int64)
        self.world.all_reduce(committed, dist.ReduceOp.MAX, what="save-commit", on="default")
        if not committed.item():
            newest = next(iter(self.store.steps()), None)
            have = "there is no older checkpoint" if newest is None else f"the newest checkpoint is step {newest}"
            reason = event.what if isinstance(event, Fault) else f"save of step {step} failed"
            raise CheckpointError(f"{reason}; {have}")
        return event
