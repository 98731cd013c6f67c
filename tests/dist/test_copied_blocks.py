"""Copies of the host's own blocks in a run: born alike on all ranks without a broadcast, and killed without a trace.

What a copy weighs follows from the host at the tick of its entry, so a kill, a resume or a rollback between staging and
entry must come to the same bits.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.kasmina.hosts import GPTConfig, ResNet20Config
from esper.tolaria.data import PySourceConfig
from esper.tolaria.training.engine import Engine
from tests.support.dist import run_distributed
from tests.support.killed_runs import Kill, assert_same_run, final, live, prepare_run
from tests.support.tiny import act, events, make_engine, replica, schedule, tiny_config, tiny_plain

ACTIONS = [
    act(3, "r0c0", "GERMINATE", blueprint="copy", ticks=2),
    act(4, "r1c0", "GERMINATE", blueprint="copy", ticks=1),
    act(5, "r0c0", "ADVANCE"),
    act(6, "r0c0", "ADVANCE"),
    act(6, "r1c0", "ADVANCE"),
    act(9, "r0c0", "ADVANCE"),
    act(10, "r0c0", "FOSSILIZE"),
    act(11, "r1c0", "PRUNE", ticks=0),
]


def plain_of(**settings: Any) -> dict[str, Any]:
    common = {
        "host": GPTConfig(layers=2, heads=2, dim=16, block=16),
        "data": PySourceConfig(block=16, max_bytes=11_952, validation=33, probe=512, test=8),
        "trainer__steps": 36,
        "trainer__batch": 16,
        "trainer__accumulate": 2,
        "control__every": 3,
        "checkpoint__every_ticks": 2,
        "checkpoint__keep": 8,
        "slots__blocks": ["copy"],
        "slots__incubation": "immediate",
        "telemetry__level": "full",
        "controller": schedule(*ACTIONS),
    }
    return tiny_plain("gpt", **{**common, **settings})


HOSTS: dict[str, dict[str, Any]] = {
    "gpt": {},
    # BatchNorm: copies have running statistics of their own. Only its first stage keeps the shape of its input.
    "cnn": {"host": ResNet20Config(width=2), "slots__ids": ["r0c0"]},
}


def has_half_the_moments(engine: Engine, slot: str) -> bool:
    """Whether a copy that has just entered begins with half of the averages of gradients, a quarter of squares."""
    kept = engine.owner.optimizer.state
    source = dict(engine.grown.model.get_submodule(engine.grown.sites[slot].module).named_parameters())
    pairs = [(kept[p], kept[source[name]]) for name, p in engine.grown.slots[slot].seed.block.named_parameters()]
    shares = {"exp_avg": 0.5, "exp_avg_sq": 0.25, "step": 1.0}
    return all(torch.equal(own[k], host[k] * share) for own, host in pairs for k, share in shares.items())


def grow_and_compare(rank: int, run_dir: Path, task: str) -> dict[str, Any]:
    actions = [action for action in ACTIONS if task == "gpt" or action["slot"] == "r0c0"]
    asked = {"slots__blocks": ["copy"], "slots__copy_init": "copy", "slots__incubation": "immediate"}
    asked["slots__copy_moments"] = 0.5
    config = tiny_config(task, controller=schedule(*actions), **asked, **HOSTS[task])
    engine = make_engine(config, run_dir)
    engine.begin(None)
    entries = {}
    while engine.step < 24:
        engine.train_step()
        if engine.tick_due():
            before = {slot: holder.seed for slot, holder in engine.grown.slots.items()}
            engine.tick()
            for slot, holder in engine.grown.slots.items():
                if before[slot] is None and holder.seed is not None:
                    source = engine.grown.model.get_submodule(engine.grown.sites[slot].module).state_dict()
                    own = holder.seed.block.state_dict()
                    entries[slot] = all(bool((own[name] == value).all()) for name, value in source.items())
                    entries[slot] = entries[slot] and has_half_the_moments(engine, slot)
    found = replica(engine)
    told = [e.what for e in events(engine).events if type(e).__name__ == "Fault"]
    engine.growth.close()
    engine.world.close()
    return {**found, "entries": entries, "faults": told}


@pytest.mark.parametrize("task", ["gpt", pytest.param("cnn", marks=pytest.mark.slow)])
def test_ranks_hold_the_same_copies_and_they_enter_as_the_host_is_then(task: str, tmp_path: Path) -> None:
    one, two = run_distributed(grow_and_compare, 2, tmp_path, task)
    assert one == two
    assert set(one["entries"]) == ({"r0c0", "r1c0"} if task == "gpt" else {"r0c0"})
    assert all(one["entries"].values())
    assert one["faults"] == []
    assert any(name.startswith("esper_slots.r0c0.seed.block.") for name in one["parameters"])
    assert not any(name.startswith("esper_slots.r1c0.seed") for name in one["parameters"]), "pruned"


CHAINS = {
    1: [Kill("forward", 3), Kill("stage", 3), Kill("hash", 4), Kill("rewrap", 5), Kill("apply", 9)],
    2: [Kill("backward", 4, rank=1), Kill("rewrap", 5, rank=0)],
    3: [Kill("forward", 4, rank=2), Kill("committed", 4, rank=0), Kill("measure", 9, rank=1)],
}


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_killed_between_staging_and_entry_the_run_is_the_one_that_nobody_disturbed(world: int, tmp_path: Path) -> None:
    calm = prepare_run(tmp_path / "calm", plain_of())
    assert live(calm, world) == [0] * world
    wanted = final(calm)
    run_dir = prepare_run(tmp_path / "run", plain_of())
    for kill in CHAINS[world]:
        live(run_dir, world, kill)
    assert live(run_dir, world) == [0] * world
    assert_same_run(final(run_dir), wanted)
