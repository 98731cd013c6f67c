"""Random crop and mirror image, each a pure function of (seed, epoch, sample id).

A sample is augmented the same way in whatever batch, on whatever rank and in whatever world it comes up, so training
on N ranks equals training on one, and a resumed run sees what the uninterrupted one saw.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.tolaria.data.configs import Augment
from esper.tolaria.data.hashing import hash_positions

__all__ = ["Augment", "augment_batch", "crop_flip"]


def crop_flip(x_NCHW: Tensor, ids: Tensor, *, seed: int, epoch: int, pad: int) -> Tensor:
    """Crops from the zero-padded image at a random place, then mirrors left and right with probability 1/2.

    Args:
        x_NCHW: normalised images; the border is 0, so the mean colour of the training part.
        ids: sample ids, int64 [N].
        seed: the run's seed; seed, epoch and id decide everything.
        epoch: pass over the data.
        pad: pixels on each side.

    Returns:
        [N, C, H, W], contiguous.
    """
    _, _, height, width = x_NCHW.shape
    bits = hash_positions(ids, "crop_flip", seed, epoch)
    places = np.uint64(2 * pad + 1)  # 16 bits scaled to this range: biased by less than one part in 2^16 / places
    tops = (bits & np.uint64(0xFFFF)) * places >> np.uint64(16)
    lefts = (bits >> np.uint64(16) & np.uint64(0xFFFF)) * places >> np.uint64(16)
    mirrored = bits >> np.uint64(63) == 1

    rows, columns = ([_overlap(place - pad, size) for place in range(2 * pad + 1)] for size in (height, width))
    images, cropped = x_NCHW.numpy(), np.zeros(x_NCHW.shape, dtype=x_NCHW.numpy().dtype)
    drawn = zip(images, cropped, tops.tolist(), lefts.tolist(), mirrored.tolist(), strict=True)
    for image, crop, top, left, mirror in drawn:  # what lies within the image; the border is zero already
        (from_rows, to_rows), (from_columns, to_columns) = rows[top], columns[left]
        (crop[..., ::-1] if mirror else crop)[:, to_rows, to_columns] = image[:, from_rows, from_columns]
    return torch.from_numpy(cropped)


def _overlap(first: int, size: int) -> tuple[slice, slice]:
    """Where a window of ``size`` that begins at ``first`` meets an image of that size: in the image, in the window."""
    inside = max(0, size - abs(first))
    start, offset = max(first, 0), max(-first, 0)
    return slice(start, start + inside), slice(offset, offset + inside)


def augment_batch(x: Any, indices: Tensor, *, augment: Augment, seed: int, epoch: int, pad: int) -> Any:
    """Inputs of training samples, changed as the config says; see `crop_flip`."""
    return crop_flip(x, indices, seed=seed, epoch=epoch, pad=pad) if augment is Augment.CROP_FLIP else x
