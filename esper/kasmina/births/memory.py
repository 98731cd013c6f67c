"""A cache of births in memory: bounded in bytes, evicts the least recently used, counts hits per interval."""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class _Held:
    tensors: dict[str, Tensor]
    bytes: int
    used: int  # tick


class Memory:
    """Tensors by birth id. Ages are counted in ticks, since clocks of ranks differ and ticks do not.

    Args:
        limit: most bytes to keep; a larger birth is not kept.

    Fields:
        tick: the present tick, set by the library.
        bytes: size of the births kept now.
        hits: lookups that found a birth, since the last `reset`.
        misses: lookups that found none, since the last `reset`.
        evicted: births evicted since the last `reset`.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.tick = limit, 0
        self.hits = self.misses = self.evicted = self.bytes = 0
        self._held: OrderedDict[str, _Held] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def oldest(self) -> int:
        """Returns the ticks since the entry that is evicted next was used; 0 if there is none."""
        return self.tick - next(iter(self._held.values())).used if self._held else 0

    def get(self, birth: str) -> dict[str, Tensor] | None:
        """Returns the tensors of a birth, which must not be written to; None if they are not here."""
        held = self._held.get(birth)
        if held is None:
            self.misses += 1
            return None
        self.hits += 1
        held.used = self.tick
        self._held.move_to_end(birth)
        return held.tensors

    def put(self, birth: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors, and evicts others if there is no room."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        before = self._held.pop(birth, None)
        self.bytes -= before.bytes if before is not None else 0
        if size > self.limit:
            return
        self._held[birth] = _Held(tensors, size, self.tick)
        self.bytes += size
        while self.bytes > self.limit:
            _, oldest = self._held.popitem(last=False)
            self.bytes -= oldest.bytes
            self.evicted += 1

    def reset(self) -> None:
        """Begins a new interval."""
        self.hits = self.misses = self.evicted = 0
