"""Seeds that are part of the network from the first step on."""

import pytest
import torch

from esper.leyline.errors import ConfigError
from esper.leyline.stages import Stage
from tests.support.tiny import act, make_engine, schedule, tiny_config

PLANTED = {"r0c0": "conv_light", "r1c0": "norm"}


def test_planted_seeds_take_part_and_learn_from_the_first_step(tmp_path):
    engine = make_engine(tiny_config("cnn", slots__planted=PLANTED, trainer__steps=8), tmp_path)
    engine.begin(None)
    before = {slot: [p.clone() for p in engine.grown.slots[slot].seed.parameters()] for slot in PLANTED}
    x = engine.bundle.example()
    with torch.no_grad():
        joined = engine.grown.model(x)
        with engine.grown.disabled():
            alone = engine.grown.model(x)
    assert not torch.equal(joined, alone)
    engine.train_step()
    for slot, old in before.items():
        assert engine.state.slot(slot).stage is Stage.FOSSILIZED
        assert engine.grown.slots[slot].level == 1.0
        assert any(not torch.equal(a, b) for a, b in zip(old, engine.grown.slots[slot].seed.parameters(), strict=True))
    result_engine = make_engine(tiny_config("cnn", slots__planted=PLANTED, trainer__steps=8), tmp_path / "whole")
    result_engine.begin(None)
    result = result_engine.run()
    assert {slot: entry["blueprint"] for slot, entry in result.topology.items()} == PLANTED
    costs = result_engine.terms.costs
    seeds = sum(costs.seeds[slot][name].forward + costs.seeds[slot][name].full for slot, name in PLANTED.items())
    assert result.flops == result.samples * (costs.host.forward + costs.host.backward + seeds)


def test_a_grown_run_ends_with_the_topology_that_another_can_be_planted_with(tmp_path):
    life = [
        act(1, "r0c0", "GERMINATE", blueprint="conv_light", ticks=1),
        act(3, "r0c0", "ADVANCE"),
        act(4, "r0c0", "ADVANCE"),
        act(6, "r0c0", "ADVANCE"),
        act(7, "r0c0", "FOSSILIZE"),
        act(2, "r1c0", "GERMINATE", blueprint="norm", ticks=1),
    ]
    grown = make_engine(tiny_config("cnn", controller=schedule(*life)), tmp_path / "grown")
    grown.begin(None)
    topology = grown.run().topology
    assert {slot: entry["blueprint"] for slot, entry in topology.items()} == {"r0c0": "conv_light"}
    planted = {slot: entry["blueprint"] for slot, entry in topology.items()}
    again = make_engine(tiny_config("cnn", slots__planted=planted), tmp_path / "again")
    again.begin(None)
    assert again.run().parameters == sum(
        p.numel() for p in grown.grown.model.parameters()
    ) - grown.grown.seed_parameters("r1c0")


def test_what_cannot_be_planted_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match="no such slot"):
        make_engine(tiny_config("cnn", slots__planted={"r9c0": "norm"}), tmp_path)
    with pytest.raises(ConfigError, match="does not fit slot r0c0"):
        make_engine(tiny_config("cnn", slots__planted={"r0c0": "mlp"}), tmp_path)
