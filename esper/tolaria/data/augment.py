"""Random crop and mirror image, each a pure function of (seed, epoch, sample id).

A sample is augmented the same way in whatever batch, on whatever rank and in whatever world it comes up, so training
on N ranks equals training on one, and a resumed run sees what the uninterrupted one saw.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from esper.tolaria.data.configs import Augment
from esper.tolaria.data.hashing import hash_positions

__all__ = ["Augment", "crop_flip"]


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

    padded = F.pad(x_NCHW, (pad, pad, pad, pad)).numpy()
    cropped = np.empty(x_NCHW.shape, dtype=padded.dtype)  # by slices: five times faster than one gather
    for place, (top, left, mirror) in enumerate(zip(tops.tolist(), lefts.tolist(), mirrored.tolist(), strict=True)):
        crop = padded[place, :, top : top + height, left : left + width]
        cropped[place] = crop[..., ::-1] if mirror else crop
    return torch.from_numpy(cropped)
