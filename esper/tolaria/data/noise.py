"""Label noise: wrong labels on purpose, in the training part alone.

Symmetric label noise as in Zhang et al. 2017, "Understanding deep learning requires rethinking generalization": a share
of the training labels is replaced by another class, each with the same probability. The choice of labels and classes is
a function of (split seed, place in the training part): the same in every run, epoch and process.
"""

import numpy as np
import torch
from torch import Tensor

from esper.tolaria.data.hashing import hash_positions, hashed_order


def with_label_noise(labels: Tensor, share: float, *, classes: int, split_seed: int) -> Tensor:
    """Returns labels of which ``round(share * N)`` are wrong.

    Args:
        labels: int64 [N], 0 to classes - 1; not changed in place.
        share: share of wrong labels, 0 to 1.
        classes: number of classes, at least 2.
        split_seed: of the data.
    """
    wrong = round(share * len(labels))
    chosen = hashed_order(len(labels), "label noise", split_seed)[:wrong]
    draws = hash_positions(chosen, "label noise class", split_seed) % np.uint64(classes - 1)
    shift = torch.from_numpy(draws.astype(np.int64)) + 1  # 1 to classes - 1: never the label itself
    noisy = labels.clone()
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy
