"""The yardstick of sizes: the bare host, whatever grows in it."""

import torch
from torch import nn

import esper
from esper.kasmina.births.build import birth_key, build_seed
from esper.kasmina.flops import host_cost
from esper.run.start.costs import build_costs
from esper.tolaria.growth.terms import host_info


def test_the_host_is_measured_without_its_seeds() -> None:
    host = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 3))
    grown = esper.attach(host, {"r0c0": "0"}, torch.ones(2, 6))
    costs = build_costs(grown, torch.ones(2, 6))
    bare = host_info(grown, costs)
    assert bare.parameters == 6 * 12 + 12 + 12 * 3 + 3
    assert bare.flops == 2 * (6 * 12 + 12 * 3) == host_cost(grown, torch.ones(2, 6)).forward
    seed = build_seed(
        "mlp",
        dim=12,
        topology=grown.sites["r0c0"].topology,
        key=birth_key(1, "r0c0", 1),
        dtype=torch.float32,
        device="cpu",
    )
    grown.slots["r0c0"].seed = seed
    assert sum(parameter.numel() for parameter in grown.model.parameters()) > bare.parameters
    assert host_info(grown, None).parameters == bare.parameters
    assert host_info(grown, None).flops is None
