"""A checkpoint loaded over a run that has grown in another way: the same as into a fresh process, bit for bit.

One run germinates, blends, prunes and stages on its way, and is saved at every tick. At its end each of its states is
loaded over it, an empty one among them; and each into an engine of its own that has never grown.
"""

import dataclasses
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.config.tree import EsperConfig
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import Phase
from esper.leyline.errors import CheckpointError
from esper.leyline.stages import Stage
from esper.tolaria.training.engine import Engine
from tests.support.dist import run_distributed, use_group
from tests.support.small_runs import train_on
from tests.support.tiny import act, bits, make_engine, replica, schedule, tiny_config

EVERY, MORE = 2, 6  # steps between ticks; steps to go on after a load
DORMANT, BLENDING, STAGED = 1, 6, 9  # ticks to go back to
ORDER = (DORMANT, STAGED, BLENDING)  # each over what the one before it had become
ACTIONS = (
    act(2, "r0c0", "GERMINATE", blueprint="conv_light", ticks=2),
    act(4, "r0c0", "ADVANCE"),
    act(4, "r1c0", "GERMINATE", blueprint="bottleneck", operator="GATE", ticks=2),
    act(5, "r0c0", "ADVANCE"),
    act(6, "r1c0", "ADVANCE"),
    act(7, "r0c0", "PRUNE"),
    act(9, "r0c1", "GERMINATE", blueprint="attention", ticks=1),
    act(11, "r0c1", "ADVANCE"),
    act(12, "r0c0", "GERMINATE", blueprint="depthwise", ticks=1),
    act(8, "r1c0", "ADVANCE"),
    act(14, "r0c0", "ADVANCE"),
)


def config_of(optimizer: str) -> EsperConfig:
    return tiny_config(
        "cnn",
        trainer__steps=2 * 14,
        control__every=EVERY,
        checkpoint__every_ticks=1,
        checkpoint__keep=20,
        optim__kind=optimizer,
        controller=schedule(*ACTIONS),
    )


def look(engine: Engine) -> dict[str, Any]:
    """Everything of this rank: what all agree on, its random stream, its wrapper, what waits."""
    staged = {slot: bits(seed.state_dict().items()) for slot, seed in engine.growth.staged.items()}
    return {
        **replica(engine),
        "keys": list(engine.grown.model.state_dict()),
        "rng": bits([("cpu", torch.get_rng_state())]),
        "staged": staged,
        "wrapped": engine.growth._wrapped,
        "window": engine.window.values(list(engine.grown.slots)),
    }


def go_on(engine: Engine) -> dict[str, Any]:
    train_on(engine, engine.step + MORE)
    return look(engine)


def grown_tensors(engine: Engine) -> list[weakref.ref[Any]]:
    """Every seed and gate and their parameters, staged ones too."""
    slots = engine.grown.slots.values()
    seeds = [module for holder in slots for module in (holder.seed, holder.gate) if module is not None]
    seeds += engine.growth.staged.values()
    return [weakref.ref(thing) for seed in seeds for thing in (seed, *seed.parameters())]


def over_and_fresh(rank: int, config: EsperConfig, run_dir: Path) -> list[tuple[Any, ...]]:
    """Per load: tick, how many things of the old topology there were and how many live on, then pairs to be equal."""
    engine = make_engine(config, run_dir)
    engine.begin(None)
    train_on(engine)
    engine.saver.finish({"step": engine.step, "tick": engine.state.tick, "epoch": 1}, 60.0)
    config.checkpoint.every_ticks = 0  # what follows only reads
    found = []
    for tick in ORDER:
        before = grown_tensors(engine)
        for parameter in engine.grown.model.parameters():
            parameter.grad = torch.ones_like(parameter)  # as if the load came in the midst of an accumulation
        del parameter
        if tick == DORMANT:
            engine.growth.clear()  # what is gone must be gone before a new wrapper is made
        else:
            engine.begin(tick * EVERY)
        gc.collect()
        alive = sum(ref() is not None for ref in before)
        engine.begin(tick * EVERY)
        found.append((len(before), alive, look(engine), go_on(engine)))
    engine.world.close()
    pairs = []
    for number, (tick, (count, alive, loaded, later)) in enumerate(zip(ORDER, found, strict=True)):
        if engine.world.size > 1:
            use_group(1 + number)
        config.checkpoint.every_ticks = 1  # the config that it was saved under
        fresh = make_engine(config, run_dir, attempt=2 + number)
        config.checkpoint.every_ticks = 0
        fresh.begin(tick * EVERY)
        pairs.append((tick, count, alive, loaded, look(fresh), later, go_on(fresh)))
        fresh.world.close()
    return pairs


def check(pairs: list[tuple[Any, ...]]) -> None:
    assert [pair[0] for pair in pairs] == list(ORDER)
    for tick, _, alive, loaded, wanted, later, wanted_later in pairs:
        assert loaded == wanted, tick
        assert later == wanted_later, tick
        assert later["parameters"] != loaded["parameters"]
        assert alive == 0, tick
        if tick == DORMANT:
            assert not [key for key in loaded["keys"] if key.startswith(CONTAINER)]
            assert {group[0] for group in loaded["groups"]} == {"host"}
            assert all(name.partition(".")[0] != CONTAINER for name in (*loaded["wrapped"], *loaded["moments"]))
            assert set(loaded["slots"].values()) == {(Phase.OFF.value, 0.0)}
            assert loaded["staged"] == {}
    assert pairs[0][1] > 6, "something had grown"
    stages = {pair[0]: [slot["stage"] for slot in pair[3]["state"]["slots"]] for pair in pairs}
    assert stages[BLENDING] == ["BLENDING", "EMPTY", "TRAINING"]
    assert set(pairs[1][3]["staged"]) == {"r0c1"}
    assert Stage.EMPTY.name in stages[STAGED] or Stage.EMBARGOED.name in stages[STAGED]


@pytest.mark.slow  # two ranks do the same below
def test_over_a_grown_run_as_into_a_fresh_one(tmp_path: Path) -> None:
    check(over_and_fresh(0, config_of("sgd"), tmp_path))


def test_a_host_whose_features_are_laid_out_otherwise_is_refused(tmp_path: Path) -> None:
    config = config_of("sgd")
    config.trainer.steps = EVERY
    engine = make_engine(config, tmp_path)
    engine.begin(None)
    train_on(engine)
    engine.saver.finish({"step": engine.step, "tick": engine.state.tick, "epoch": 1}, 60.0)
    site = engine.grown.sites["r0c1"]
    engine.grown.sites["r0c1"] = dataclasses.replace(site, layout="BHWC")
    said = "slot r0c1 had features BCHW, causal, now they are BHWC, causal; is the host the same?"
    with pytest.raises(CheckpointError, match=said):
        engine.begin(EVERY)
    engine.grown.sites["r0c1"] = site
    engine.begin(EVERY)
    engine.world.close()


def test_over_a_grown_run_on_two_ranks(tmp_path: Path) -> None:
    results = run_distributed(over_and_fresh, 2, config_of("adamw"), tmp_path, groups=1 + len(ORDER))
    for pairs in results:
        check(pairs)
    for mine, theirs in zip(*results, strict=True):
        same = [
            {key: value for key, value in pair[3].items() if key not in ("rng", "window")} for pair in (mine, theirs)
        ]
        assert same[0] == same[1]
