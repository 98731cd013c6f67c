"""What a rehearsal needs: batches of any size, a backward that leaves gradients alone, and what it found on disk."""

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from esper.kasmina.axes.feature import tensors_in


def resize_batch(example: Any, size: int) -> Any:
    """Returns the example with ``size`` samples: its rows repeated, in the same memory format, detached.

    Args:
        example: tensors with the batch axis first, alone or nested; 0-D tensors stay as they are.
        size: samples in the result.
    """

    def rows(tensor: Tensor) -> Tensor:
        if not tensor.ndim:
            return tensor
        last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        picked = tensor.detach()[torch.arange(size, device=tensor.device) % len(tensor)]
        return picked.contiguous(memory_format=torch.channels_last) if last else picked.contiguous()

    return tree_map_only(Tensor, rows, example)


def backward(outputs: Sequence[Any], leaves: Sequence[Tensor] | None = None) -> None:
    """Runs backward from the outputs to whatever leaves there are, or to these alone, whose ``grad`` then stays."""
    tensors = [tensor for output in outputs for tensor in tensors_in(output) if tensor.requires_grad]
    ones = [torch.ones_like(tensor) for tensor in tensors]
    if leaves is not None and tensors:
        torch.autograd.grad(tensors, leaves, ones, allow_unused=True)
    elif tensors:
        torch.autograd.backward(tensors, ones)


class Ahead(Protocol):
    """Who compiles beside training."""

    def begin(self, record: Any) -> None:
        """Orders what is left to compile by the agreed record with which the run begins, or goes on."""

    def watched(self) -> contextlib.AbstractContextManager[None]:
        """Within the block this process compiles, and must not wait for whoever has stopped."""

    def close(self) -> None:
        """Ends it."""


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a rehearsal took.

    Fields:
        where: slot id, or ``host``.
        compile_ms: milliseconds of wall-clock time.
        hits: graphs that inductor found on disk.
        misses: graphs that it had to compile; both 0 for another backend.
    """

    where: str
    compile_ms: float
    hits: int
    misses: int


class Stopwatch:
    """Measures one rehearsal, by torch's own counters."""

    def __init__(self) -> None:
        self._began, self._before = time.perf_counter(), cache_counts()

    def stop(self, where: str) -> Compiled:
        """Returns what was measured since it was made."""
        hits, misses = (now - then for now, then in zip(cache_counts(), self._before, strict=True))
        return Compiled(where, 1e3 * (time.perf_counter() - self._began), hits, misses)


def cache_counts() -> tuple[int, int]:
    """Hits and misses of inductor's cache of graphs, in this process."""
    from torch._dynamo.utils import counters  # imported here: it takes two seconds, which a run that compiles pays

    return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]
