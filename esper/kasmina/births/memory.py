"""The births used last, in memory: least recently used goes first, bounded in bytes, with figures per interval."""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class _Held:
    tensors: dict[str, Tensor]
    bytes: int
    used: int  # tick


class Memory:
    """Tensors by birth id. Ages are in ticks, told by `tick`: clocks of ranks differ, ticks do not.

    Args:
        limit: bytes. A birth larger than that is not kept.

    Fields:
        tick: now. hits, misses, evicted: since the last `reset`.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.tick = limit, 0
        self.hits = self.misses = self.evicted = self.bytes = 0
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def oldest(self) -> int:
        """Ticks since the entry that would go next was used; 0 without any."""
        return self.tick - next(iter(self._held.values())).used if self._held else 0

    def get(self, birth: str) -> dict[str, Tensor] | None:
        """Its tensors, which are not to be written to; None is a miss."""
        held = self._held.get(birth)
        if held is None:
            self.misses += 1
            return None
        self.hits += 1
        held.used = self.tick
        self._held.move_to_end(birth)
        return held.tensors

    def put(self, birth: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors, at the cost of others."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        before = self._held.pop(birth, None)
        self.bytes -= before.bytes if before is not None else 0
        if size > self.limit:
            return
        self._held[birth] = _Held(tensors, size, self.tick)
        self.bytes += size
        while self.bytes > self.limit:
            _, gone = self._held.popitem(last=False)
            self.bytes -= gone.bytes
            self.evicted += 1

    def reset(self) -> None:
        """Begins a new interval."""
        self.hits = self.misses = self.evicted = 0
