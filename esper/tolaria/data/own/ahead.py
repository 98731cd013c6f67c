"""Fetches batches ahead in workers without a state of their own.

The loop announces which samples come next; torch's DataLoader reads them in its workers, a whole batch at a time, and
hands batches back in order: a user's own data sample by sample, each under streams of its own (`SampleReader`), every
other kind with its augmentation, which is a pure function of (seed, epoch, sample id) (`TrainReader`). What a run saves
is its cursor alone. So a run may have another number of workers after each resume, and where the cursor jumps (a
rollback) the queue is simply begun anew.
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
from torch.utils.data import DataLoader, Dataset

from esper.leyline.errors import ConfigError, DataError, one_line
from esper.tolaria.data.augment import Augment, augment_batch

Request = tuple[Tensor, int]  # ids, int64 [N], and epoch


def _context() -> Any:
    """Workers fork off a server that has imported torch once, and holds neither threads nor a device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.utils.data", "esper.tolaria.data.parts", "esper.tolaria.data.own.streams"])
    return context


class TrainReader:
    """Fetches training samples as `Bundle.train_batch` does; goes to a worker, so it holds the training part alone.

    Args:
        part: the training part.
        augment: what happens to its inputs.
        pad: pixels by which a crop shifts at most.
        seed: the run's.
    """

    def __init__(self, part: Any, augment: Augment, pad: int, seed: int) -> None:
        self.part, self.augment, self.pad, self.seed = part, augment, pad, seed

    def __call__(self, epoch: int, ids: Tensor) -> tuple[Any, Any]:
        """A batch of an epoch; ``ids`` is int64 [N]."""
        x, y = self.part.fetch_train(ids, seed=self.seed, epoch=epoch)
        return augment_batch(x, ids, augment=self.augment, seed=self.seed, epoch=epoch, pad=self.pad), y


class _Requests(Dataset[Any]):
    """Batches by request: the data set that torch's loader sees."""

    def __init__(self, read: Callable[[int, Tensor], Any]) -> None:
        self.read = read

    def __getitem__(self, request: tuple[int, list[int]]) -> Any:
        epoch, ids = request
        return self.read(epoch, torch.tensor(ids, dtype=torch.int64))


def _as_it_is(batch: Any) -> Any:
    return batch


class Ahead:
    """The queue of one rank.

    Args:
        read: makes a batch of an epoch and of ids, int64 [N]; goes to the workers.
        workers: processes that read.
        pinned: whether batches are handed over in pinned memory, for a GPU.
    """

    def __init__(self, read: Callable[[int, Tensor], Any], workers: int, *, pinned: bool = False) -> None:
        self.read, self.workers, self.pinned = read, workers, pinned
        self._asked: deque[tuple[int, list[int]]] = deque()
        self._batches: Iterator[Any] | None = None
        self._open = False

    def begin(self, requests: Iterator[Request]) -> None:
        """Announces what will be fetched, in order; what was announced before is forgotten."""
        self.close()

        def ask() -> Iterator[tuple[int, list[int]]]:
            for ids, epoch in requests:
                self._asked.append((epoch, ids.tolist()))
                yield epoch, ids.tolist()

        loader: DataLoader[Any] = DataLoader(
            _Requests(self.read),
            batch_size=None,
            sampler=ask(),
            num_workers=self.workers,
            collate_fn=_as_it_is,
            pin_memory=self.pinned,
            generator=torch.Generator(),  # the global stream must not move
            multiprocessing_context=_context(),
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns beside the error
                self._batches = iter(loader)
        except OSError as error:
            raise ConfigError(
                f"data.workers = {self.workers}: they cannot be started ({one_line(error)}); make it smaller, or 0"
            ) from None
        except RuntimeError as error:  # the data go to the workers in shared memory
            raise ConfigError(
                f"data.workers = {self.workers}: the data cannot be shared with them ({one_line(error)}); make "
                "/dev/shm as large as the training part, or set data.workers=0"
            ) from None
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
