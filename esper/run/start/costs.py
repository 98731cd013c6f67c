"""Counts what the parts of a run cost."""

from collections.abc import Mapping
from typing import Any

from esper.accord.account import Costs
from esper.kasmina.attribution.statistics import tracking
from esper.kasmina.blueprints import registry
from esper.kasmina.flops import host_cost, seed_cost
from esper.kasmina.slots.grown import Grown
from esper.leyline.costs import SeedCost
from esper.leyline.legality import COPY


def build_costs(grown: Grown, example: Any, statistics: int = 0, copies: Mapping[str, SeedCost] | None = None) -> Costs:
    """Counts the FLOPs and parameters of the host and of every seed, per sample.

    Args:
        grown: the host, its slots empty.
        example: inputs of a few samples.
        statistics: samples from which all ranks together take running statistics, if the host has any.
        copies: cost of a copy of the host's block, for the slots that have it on offer.
    """
    seeds = {
        slot: {
            info.name: seed_cost(site.topology, info.name, site.dim, site.shape)
            for info in registry.catalogue(site.topology, site.dim, site.positions, asked=registry.names(site.topology))
        }
        | ({COPY: copies[slot]} if copies and slot in copies else {})
        for slot, site in grown.sites.items()
    }
    return Costs(host=host_cost(grown, example), seeds=seeds, statistics=statistics if tracking(grown.model) else 0)
