"""Counts collectives below our code: every ``c10d`` operator that the dispatcher executes, whoever issued it.

Python's torch.distributed, DDP's C++ reducer and the object collectives all end in these operators, so nothing of ours
has to be trusted. The group is read off the operator's own arguments.
"""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


class CollectiveCounter(TorchDispatchMode):
    """Within the block, counts (operator, group name) and notes the bytes of every tensor handed in.

    Fields:
        counts: number of calls by (operator, group name). sizes: bytes per call, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            flat = torch.utils._pytree.tree_leaves((args, kwargs or {}))
            self.counts[func._opname, self._group(flat)] += 1
            self.sizes.append(sum(leaf.nbytes for leaf in flat if isinstance(leaf, torch.Tensor)))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _group(flat: list[Any]) -> str:
        for leaf in flat:
            if isinstance(leaf, torch.ScriptObject) and "ProcessGroup" in str(leaf._type()):
                return str(dist.ProcessGroup.unbox(leaf).group_name)
        return "?"

    def kinds(self) -> dict[str, int]:
        """Calls by operator, over all groups."""
        found: Counter[str] = Counter()
        for (kind, _), count in self.counts.items():
            found[kind] += count
        return dict(found)
