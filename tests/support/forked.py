"""Loaded last by the server that ranks are forked off: does once what each of them would else do again.

Ranks on the hosts of `tests.support.tiny` count the same seeds at each start. What is loaded is kept from the garbage
collector, so that its memory stays shared.
"""

import gc

import torch

from esper.kasmina.blueprints import registry
from esper.kasmina.flops import seed_cost
from esper.kasmina.memory import seed_memory
from esper.leyline.topology import Topology
from esper.tolaria.ranks.handshake import code_digest

SITES = [
    (Topology.FEATURE_MAP, 4, (4, 8, 8)),
    (Topology.FEATURE_MAP, 4, (4, 4, 4)),
    (Topology.FEATURE_MAP, 8, (8, 4, 4)),
    (Topology.FEATURE_MAP, 8, (8, 8, 8)),
    (Topology.SEQUENCE, 16, (16, 16)),
]


def count_seeds() -> None:
    """Fills the caches of what counts seeds, unless torch starts threads for a backward, which no fork survives."""
    if torch.backends.cuda.is_built():
        return
    for topology, dim, shape in SITES:
        positions = shape[0] if topology is Topology.SEQUENCE else shape[1] * shape[2]
        for info in registry.catalogue(topology, dim, positions, asked=registry.names(topology)):
            seed_cost(topology, info.name, dim, shape)
            seed_memory(topology, info.name, dim, shape, torch.float32)


count_seeds()
code_digest()
gc.collect()
gc.freeze()
