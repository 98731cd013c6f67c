"""What empty slots take of memory, by the account of torch's allocator."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from tests.support.tiny import make_engine, tiny_config
from tests.tolaria.training.test_step_cost import by_hand


def changes(step: Callable[[], Any]) -> list[int]:
    """Bytes of each allocation of a step, negative where memory is given back, in their order."""
    step()  # the first optimizer step makes its state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return [size for _, size in memory]


def test_empty_slots_take_no_memory_at_the_peak_of_a_step(tmp_path: Path) -> None:
    """Budget: 1.01 of the host alone. Allocations are counted, so the machine's noise is not in it."""
    engine = make_engine(tiny_config("gpt", trainer__batch=64), tmp_path)
    engine.begin(None)
    ours, theirs = changes(engine.train_step), changes(by_hand(engine))
    peaks = [max(itertools.accumulate(found)) for found in (ours, theirs)]
    taken = [sum(size for size in found if size > 0) for found in (ours, theirs)]
    counts = [sum(size > 0 for size in found) for found in (ours, theirs)]
    assert peaks[0] <= 1.01 * peaks[1], peaks
    assert taken[0] <= 1.01 * taken[1], taken
    assert counts[0] - counts[1] <= 60, counts
