"""Fetches batches ahead in workers without a state of their own.

The loop announces which samples come next; torch's DataLoader reads them in its workers, each sample under streams of
its own, and hands batches back in order. What a run saves is its cursor alone. So a run may have another number of
workers after each resume, and where the cursor jumps (a rollback) the queue is simply begun anew.
"""

import contextlib
import multiprocessing
import pickle
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from esper.leyline.errors import ConfigError, DataError, one_line
from esper.tolaria.data.own.streams import SampleReader

Request = tuple[Tensor, int]  # ids, int64 [N], and epoch


def _context() -> Any:
    """Workers fork off a server that has imported torch once, and holds neither threads nor a device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.data", "esper.tolaria.data.own.streams"])
    return context


class Ahead:
    """The queue of one rank.

    Args:
        reader: reads samples.
        collate: makes a batch of them.
        workers: processes that read.
    """

    def __init__(self, reader: SampleReader, collate: Callable[[list[Any]], Any], workers: int) -> None:
        self.reader, self.collate, self.workers = reader, collate, workers
        self._asked: deque[tuple[int, list[int]]] = deque()
        self._batches: Iterator[Any] | None = None
        self._open = False

    def begin(self, requests: Iterator[Request]) -> None:
        """Announces what will be fetched, in order; what was announced before is forgotten."""
        self.close()

        def ask() -> Iterator[list[tuple[int, int]]]:
            for ids, epoch in requests:
                self._asked.append((epoch, ids.tolist()))
                yield [(epoch, index) for index in ids.tolist()]

        loader: DataLoader[Any] = DataLoader(
            self.reader,
            batch_sampler=ask(),
            num_workers=self.workers,
            collate_fn=self.collate,
            generator=torch.Generator(),  # the global stream must not move
            multiprocessing_context=_context(),
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns beside the error
                self._batches = iter(loader)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"data.workers = {self.workers}: the data set, its collate function or its augmentation cannot be sent "
                f"to a worker ({one_line(error)}); define them at the top of a module, or set data.workers=0"
            ) from None

    @property
    def active(self) -> bool:
        """Whether workers read."""
        return self._batches is not None

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Within the block fetches of training samples are those that were announced."""
        self._open = True
        try:
            yield
        finally:
            self._open = False

    def take(self, ids: Tensor, epoch: int) -> Any:
        """The next batch if it is the one that is asked for; None if it must be read here."""
        if not self._open or self._batches is None:
            return None
        try:
            batch = next(self._batches)
        except (StopIteration, AssertionError):
            self.close()
            return None
        except Exception as error:
            last = [line for line in str(error).splitlines() if line.strip()][-1:]
            raise DataError(f"a worker, {' '.join(last)}") from None
        if self._asked.popleft() != (epoch, ids.tolist()):
            self.close()
            return None
        return batch

    def close(self) -> None:
        """Ends the workers."""
        self._asked.clear()
        batches, self._batches = self._batches, None
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()
