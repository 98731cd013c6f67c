"""Digests of tensors: 62 bits that are equal exactly when the bits are (up to collisions).

On the CPU it is xxh3 of the bytes. On an accelerator the bytes stay there: it is an int64 sum of the mixed 8-byte
words, each weighted by an odd number that depends on its position, so that neither an exchange nor a shift cancels out.
One number per tensor comes back. Words are mixed first: if they differ in high bits only (x and -x, powers of two), the
even difference of two weights would leave few of the sum's 64 bits, or none.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor

PIECE = 2**26  # bytes of a tensor that are mixed at a time on an accelerator; a multiple of 8
_MASK = (1 << 62) - 1
_ODD = -7046029254386353131  # 64-bit fraction of the golden ratio


def _words(raw: Tensor) -> Tensor:
    """Bytes as int64 words, the last one filled with zeros."""
    pad = -raw.numel() % 8
    if pad:
        raw = torch.cat([raw, raw.new_zeros(pad)])
    return raw.view(torch.int64)


def weighted_sum(tensor: Tensor) -> Tensor:
    """0-D int64: sum of the tensor's mixed 8-byte words times odd position weights, wrapping. Stays on the device.

    It goes piece by piece, so that it takes a few pieces of memory beside the tensor, and not three times the tensor.
    """
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=raw.device)
    for first in range(0, raw.numel(), PIECE):
        words = _words(raw[first : first + PIECE])
        for _ in range(2):  # high bits reach the low ones; each step is one to one, so every bit still counts
            words = words * _ODD
            words ^= (words >> 32) & 0xFFFFFFFF
        # (2i + 1) times an odd constant: odd, hence invertible, distinct for each i.
        place = torch.arange(first // 8, first // 8 + words.numel(), device=words.device, dtype=torch.int64)
        total += (words * (2 * place + 1).mul_(_ODD)).sum()
    return total


def _tensor_bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _leaves(named: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of (name, tree) pairs, in order. A module's extra state may be a tree."""
    for name, value in named:
        if isinstance(value, Mapping):
            yield f"{name}|{len(value)} entries", None
            yield from _leaves((f"{name}[{key!r}]", item) for key, item in value.items())
        elif isinstance(value, list | tuple):
            yield f"{name}|{len(value)} items", None
            yield from _leaves((f"{name}[{index}]", item) for index, item in enumerate(value))
        else:
            yield name, value


def digest_tensors(named: Iterable[tuple[str, Any]]) -> int:
    """62-bit digest over names, dtypes, shapes and bits, in the order given.

    Args:
        named: (name, tensor) pairs in canonical order, tensors all on one device; plain data (numbers, text,
            containers) may stand among them.
    """
    total = xxhash.xxh3_64()
    pending: list[Tensor] = []
    for name, tensor in _leaves(named):
        if not isinstance(tensor, Tensor):
            total.update(f"{name}|{type(tensor).__name__}|{tensor!r}".encode())
            continue
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
        if tensor.numel() == 0:
            continue
        if tensor.device.type == "cpu":
            total.update(_tensor_bytes(tensor))
        else:
            pending.append(weighted_sum(tensor))
    if pending:
        total.update(_tensor_bytes(torch.stack(pending).cpu()))
    return total.intdigest() & _MASK
