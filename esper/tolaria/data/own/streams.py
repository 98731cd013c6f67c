"""Random streams of a sample: torch's, numpy's and `random`'s are set from (seed, epoch, sample id) before it is read.

So whatever a data set draws belongs to the sample, and not to the process that happens to read it: any number of
workers, ranks and restarts gives the same bits.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from esper.kasmina.streams import read_streams, set_streams
from esper.leyline.errors import DataError, one_line
from esper.leyline.plain import digest62

Augment = Callable[[Any, torch.Generator], Any]


def set_sample_streams(*key: int | str) -> int:
    """Sets the streams of this process from a key; returns the seed."""
    seed = digest62(["sample", *key])
    torch.random.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which seeds every device
    np.random.seed(seed % 2**32)
    random.seed(seed)
    return seed


class SampleReader(Dataset[Any]):
    """Reads samples under streams of their own; a map-style data set whose keys are (epoch, id).

    Args:
        dataset: the user's, map-style.
        augment: changes a sample by a generator of its own in training; None: nothing does.
        seed: the run's.
    """

    def __init__(self, dataset: Any, augment: Augment | None, seed: int) -> None:
        self.dataset, self.augment, self.seed = dataset, augment, seed

    def __getitem__(self, key: tuple[int | str, int]) -> Any:
        epoch, index = key
        seed = set_sample_streams(self.seed, epoch, index)
        try:
            sample = self.dataset[index]
            if self.augment is None or isinstance(epoch, str):
                return sample
            return self.augment(sample, torch.Generator().manual_seed(seed))
        except Exception as error:
            what = one_line(error)
            raise DataError(f"data: sample {index} cannot be read: {what}; correct the data set") from error

    def read(self, epoch: int | str, indices: Sequence[int]) -> list[Any]:
        """Samples of an epoch, or of an evaluation if ``epoch`` is text; streams are as before."""
        before = read_streams()
        try:
            return [self[epoch, index] for index in indices]
        finally:
            set_streams(before)


def check_alike(read: Callable[[], Any], what: str) -> None:
    """Reads samples twice: whatever is not the same again draws from a stream of its own, and no run with it is exact.

    Args:
        read: reads them, with all that is drawn for them.
        what: they are, for the error.

    Raises:
        DataError: they differ.
    """
    first, again = ([leaf for leaf in tree_leaves(read()) if isinstance(leaf, Tensor)] for _ in range(2))
    if len(first) == len(again) and all(_same(one, other) for one, other in zip(first, again, strict=True)):
        return
    raise DataError(
        f"data: {what}, read twice, are not the same: they draw from a generator that the data set keeps, or the "
        "collate function draws, so no resume would be exact; draw in __getitem__ from torch, numpy.random or random, "
        "which are seeded for each sample, or in augment from the generator that it is given"
    )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())
