"""Compares tensors bit for bit, which `torch.equal` does not (-0.0 equals 0.0 there, NaN equals nothing)."""

import torch
from torch import Tensor

from esper.kasmina.axes.feature import tensors_in

WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def bits(a: object, b: object) -> bool:
    """Whether all tensors of two outputs hold the same bits in the same dtype, shape and order."""

    def words(x: Tensor) -> Tensor:
        return x.detach().contiguous().view(WORDS[x.element_size()])

    pairs = list(zip(tensors_in(a), tensors_in(b), strict=True))
    return bool(pairs) and all(x.dtype == y.dtype and torch.equal(words(x), words(y)) for x, y in pairs)
