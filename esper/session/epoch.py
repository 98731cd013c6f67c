"""One epoch over loaders whose lengths may differ between ranks: all ranks get the same number of batches.

A rank with one batch more than another would wait in a reduction that no other rank enters. Loaders with a length agree
once on the smallest. Without a length the ranks ask each other before every batch (one all-reduce of 8 bytes), and the
first rank that has no more batches ends the epoch for all.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from esper.leyline.errors import ConfigError
from esper.tolaria.ranks.world import World


def timed(batches: Iterable[Any], waited: Callable[[float], None]) -> Iterator[Any]:
    """Yields batches, and tells how many milliseconds each was waited for."""
    source, nothing = iter(batches), object()
    while True:
        began = time.perf_counter()
        batch = next(source, nothing)
        waited(1e3 * (time.perf_counter() - began))
        if batch is nothing:
            return
        yield batch


def agreed_batches(loader: Iterable[Any], world: World, waited: Callable[[float], None]) -> Iterator[Any]:
    """Yields this rank's batches, as many as on every other rank.

    Args:
        loader: of this rank.
        world: the ranks.
        waited: takes the milliseconds for which the loader was waited, not those for other ranks.

    Raises:
        ConfigError: on every rank if a loader is empty, or has a length on some ranks only; on one rank if its loader
            ends before its own length (the others name that rank when they wait for it in vain).
    """
    try:
        length = len(loader)  # type: ignore[arg-type]
    except TypeError:
        length = -1
    pair = world.all_reduce(torch.tensor([length, -length]), dist.ReduceOp.MIN, what="epoch")
    least, most = int(pair[0]), -int(pair[1])
    if least < 0 <= most:
        raise ConfigError("loader: it has a length on some ranks only; use the same kind on every rank")
    if least == 0:
        raise ConfigError("loader: it is empty" + (" on some rank" if world.size > 1 else ""))
    if least < 0:
        yield from _ask_before_each(timed(loader, waited), world)
        return
    count = 0
    for batch in timed(loader, waited):
        count += 1
        yield batch
        if count == least:
            return
    raise ConfigError(f"loader: it said {length} batches and ended after {count}")


def _ask_before_each(loader: Iterable[Any], world: World) -> Iterator[Any]:
    """Yields batches while every rank has one."""
    batches, nothing = iter(loader), object()
    while True:
        batch = next(batches, nothing)
        more = torch.tensor([batch is not nothing], dtype=torch.int64)
        if not world.all_reduce(more, dist.ReduceOp.MIN, what="next batch").item():
            return
        yield batch
