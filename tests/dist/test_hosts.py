"""Hosts that need more than the usual grow on two ranks: one with running statistics, one with slots inside blocks."""

from pathlib import Path
from typing import Any

import torch

from esper.config.tree import EsperConfig
from esper.kasmina.hosts import GPTConfig, ResNet20Config
from esper.leyline.events import StageChanged
from tests.support.dist import run_distributed
from tests.support.tiny import act, bits, events, make_engine, replica, schedule, tiny_config

WHOLE = ["GERMINATED", "TRAINING", "BLENDING", "HOLDING", "FOSSILIZED"]


def life(slot: str, blueprint: str) -> list[dict[str, Any]]:
    """A seed's whole life, from tick 1 to 8."""
    onward = [act(tick, slot, "ADVANCE") for tick in (3, 4, 7)]
    return [act(1, slot, "GERMINATE", blueprint=blueprint, ticks=2), *onward, act(8, slot, "FOSSILIZE")]


def live(rank: int, config: EsperConfig, run_dir: Path) -> dict[str, Any]:
    engine = make_engine(config, run_dir)
    engine.begin(None)
    before, after = [], []
    while engine.step < engine.terms.total_steps:
        engine.train_step()
        if engine.tick_due():
            before.append(bits(engine.grown.model.named_buffers()))
            engine.tick()
            after.append(replica(engine))
    drawn = float(torch.rand(()))
    result = engine.finish()
    stages = [(event.slot, event.target.name) for event in events(engine).of(StageChanged)]
    return {"before": before, "after": after, "result": result, "stages": stages, "random": drawn}


def one_network(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert mine["random"] != theirs["random"], "ranks share a random stream: this test would see nothing"
    assert len(mine["after"]) == 10
    for tick, (one, other) in enumerate(zip(mine["after"], theirs["after"], strict=True), start=1):
        for what in one:
            assert one[what] == other[what], f"tick {tick}: {what} differs"
    assert mine["result"] == theirs["result"]


def test_replicas_of_a_resnet_are_bitwise_equal_through_a_growth_buffers_included(tmp_path: Path) -> None:
    actions = life("r1c0", "conv_small")
    config = tiny_config("cnn", host=ResNet20Config(width=4), controller=schedule(*actions), trainer__steps=20)
    mine, theirs = run_distributed(live, 2, config, tmp_path)
    assert mine["stages"] == [("r1c0", stage) for stage in WHOLE]
    one_network(mine, theirs)
    for tick, (one, other) in enumerate(zip(mine["before"], theirs["before"], strict=True), start=1):
        parted = {name for name in one if one[name] != other[name]}
        statistics = {name for name in one if name.endswith(("running_mean", "running_var"))}
        assert parted == statistics, f"tick {tick}: ranks should differ in what they measured, and in nothing else"
        assert len(statistics) == 2 * 19
    assert len({tick["buffers"]["norm.running_mean"] for tick in mine["after"]}) == 10, "the statistics never moved"


def test_seeds_inside_the_blocks_of_a_gpt_live_alike_on_two_ranks(tmp_path: Path) -> None:
    host = GPTConfig(layers=2, heads=2, dim=16, block=16, sites=["attention", "mlp"])
    actions = [*life("r0c1", "lora_large"), *life("r1c2", "mlp_small")]
    settings = {"controller": schedule(*actions), "gates__allow_foldable": True}  # low rank at a Linear that learns
    config = tiny_config("gpt", host=host, trainer__steps=20, **settings)
    mine, theirs = run_distributed(live, 2, config, tmp_path)
    assert sorted(mine["stages"]) == sorted((slot, stage) for slot in ("r0c1", "r1c2") for stage in WHOLE)
    one_network(mine, theirs)
    grown = {name for name in mine["after"][-1]["parameters"] if name.startswith("esper_slots.")}
    assert {name.split(".")[1] for name in grown} == {"r0c1", "r1c2"}
