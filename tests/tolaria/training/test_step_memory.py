"""What empty slots take of memory, by the account of torch's allocator; and that births and prunes leave nothing."""

import gc
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from esper.accord.effects import Uproot
from esper.leyline.alpha import Curve, Operator, Ramp
from esper.leyline.stages import Stage
from esper.tolaria.training.engine import Engine
from tests.support.tiny import make_engine, tiny_config
from tests.tolaria.training.test_step_cost import blend_three, by_hand


def changes(step: Callable[[], Any]) -> list[int]:
    """Bytes of each allocation of a step, negative where memory is given back, in their order."""
    step()  # the first optimizer step makes its state
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return [size for _, size in memory]


def compare(ours: list[int], theirs: list[int], budget: float) -> None:
    """Peak and sum of bytes within the budget; allocations are counted, so the machine's noise is in none of them."""
    peaks = [max(itertools.accumulate(found)) for found in (ours, theirs)]
    taken = [sum(size for size in found if size > 0) for found in (ours, theirs)]
    counts = [sum(size > 0 for size in found) for found in (ours, theirs)]
    print(f"peak {peaks}, taken {taken}, allocations {counts}")
    assert peaks[0] <= budget * peaks[1], peaks
    assert taken[0] <= budget * taken[1], taken
    assert counts[0] - counts[1] <= 60, counts


def test_empty_slots_take_no_memory_at_the_peak_of_a_step(tmp_path: Path) -> None:
    """Against the host alone."""
    engine = make_engine(tiny_config("gpt", trainer__batch=64), tmp_path)
    engine.begin(None)
    compare(changes(engine.train_step), changes(by_hand(engine)), 1.01)


def test_blended_seeds_take_the_memory_of_the_same_graph_written_by_hand(tmp_path: Path) -> None:
    """Three seeds at half alpha; the budget is that of the step's time."""
    engine = make_engine(tiny_config("cnn", trainer__batch=64), tmp_path)
    engine.begin(None)
    network = blend_three(engine)
    compare(changes(engine.train_step), changes(by_hand(engine, network)), 1.03)


def live(engine: Engine, generation: int) -> None:
    """One seed: born, blended, now and then a step and what a tick reads, pruned."""
    slot = "r0c0"
    seed = engine.growth.build(slot, "conv_light", generation)
    engine.growth.plant(slot, seed)
    rest = {"first_step": 0, "last_step": 0, "curve": Curve.LINEAR, "steepness": 6.0, "operator": Operator.ADD}
    (entry,) = (entry for entry in engine.state.slots if entry.slot == slot)
    empty = engine.state
    ramp = Ramp(start=0.5, target=0.5, **rest)
    blended = {"stage": Stage.BLENDING, "generation": generation, "blueprint": "conv_light", "operator": Operator.ADD}
    more = {"learn_step": 0, "curve": Curve.LINEAR, "ramp": ramp, "finite": True, "owned": True}
    engine.state = empty.with_slots({slot: replace(entry, **blended, **more)})
    engine.growth.follow(engine.state)
    if generation % 10 == 0:
        engine.train_step()
        engine.owner.health.take()
    engine.growth.perform([Uproot(slot)])
    engine.window.reset(0)
    engine.state = replace(empty, step=engine.step)
    engine.growth.follow(engine.state, force=True)


@pytest.mark.slow
def test_memory_is_flat_over_a_thousand_births_and_prunes(tmp_path: Path) -> None:
    engine = make_engine(tiny_config("cnn", trainer__steps=200), tmp_path)
    engine.begin(None)
    engine.window.settle()
    held = []
    for generation in range(1, 1001):
        live(engine, generation)
        if generation in (200, 1000):
            gc.collect()
            objects = gc.get_objects()
            tensors = [one for one in objects if type(one) in (torch.Tensor, torch.nn.Parameter)]
            held.append((len(tensors), sum(one.nbytes for one in tensors), len(objects)))
            del objects, tensors
    (few, small, before), (many, large, after) = held
    assert (many, large) == (few, small), held
    assert after - before < 800, "fewer than one Python object a cycle"
