"""Random numbers as pure functions of (key, position): splitmix64, vectorised.

Splits and augmentation must not depend on batch composition, world size or the version of a random number library. So
they are hashes of what they belong to, not draws from a stream. Number i of a key's sequence is

    mix(key + (i + 1) * golden),  all in 64-bit unsigned arithmetic

Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.leyline.errors import DataError
from esper.leyline.plain import digest62
from esper.tolaria.data.registry import DataConfig

_GOLDEN = np.array([0x9E3779B97F4A7C15], dtype=np.uint64)
_MIX_1 = np.array([0xBF58476D1CE4E5B9], dtype=np.uint64)
_MIX_2 = np.array([0x94D049BB133111EB], dtype=np.uint64)


def hash_positions(positions: Tensor, *key: int | str) -> npt.NDArray[np.uint64]:
    """Hashes each position with a key to a 64-bit number.

    Args:
        positions: int64 [N], not negative.
        key: identifies the sequence; 1 and "1" are different keys.
    """
    start = np.array([digest62(list(key))], dtype=np.uint64)
    state = start + (positions.numpy().astype(np.uint64) + np.uint64(1)) * _GOLDEN
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def hashed_order(size: int, *key: int | str) -> Tensor:
    """A permutation of 0 .. size-1, int64, the same on every machine and with every library version."""
    return torch.from_numpy(np.argsort(hash_positions(torch.arange(size), *key), kind="stable"))


def seeded_order(size: int, *key: int | str) -> Tensor:
    """A permutation of 0 .. size-1, int64, from a generator of its own; no other random stream moves."""
    generator = torch.Generator()
    generator.manual_seed(digest62(list(key)))
    return torch.randperm(size, generator=generator)


def split_order(config: DataConfig, size: int, needed: int, what: str) -> Tensor:
    """The order in which ``size`` units are dealt to parts, int64 [size]; a pure function of ``split_seed``.

    Raises:
        DataError: after the ``needed`` units of the other parts, fewer than 2 are left for training.
    """
    if size < needed + 2:
        raise DataError(
            f"data={config.kind}: {what} has {size} samples, but the other parts take {needed} and training needs 2; "
            "make those parts smaller (data.validation, data.probe) or bring more data"
        )
    return hashed_order(size, "split", config.split_seed)
