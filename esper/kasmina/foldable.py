"""Which seeds add nothing to a host that learns: those that export would fold into one of its layers.

A linear seed delta(h) = A h + c behind a Linear h = W x + b makes (I + f A) W x + (I + f A) b + f c: a Linear again,
with other weights. While W and b learn, they can become whatever the seed makes of them; a low-rank seed there (Hu et
al. 2021, "LoRA") at most learns at another pace. Behind a frozen W it adds what W cannot become. So the answer is read
off the structure, not off losses: `esper.kasmina.export.folding` says what folds where, ``requires_grad`` what learns.
It is asked of blueprints, before any seed is built.

Twist: whether a seed is affine is tried out on a small one with weights drawn at random, since fresh weights may be
zero where trained ones are not (an offset, which a Linear without bias cannot take).
"""

import functools
from typing import Any

import torch

from esper.kasmina.axes.positions import Mixing
from esper.kasmina.births.build import construct
from esper.kasmina.blueprints import registry
from esper.kasmina.blueprints.entry import Blueprint
from esper.kasmina.export.folding import affine_map, joined_before, target_of, tied_tensors
from esper.kasmina.export.tracing import as_graph
from esper.kasmina.slots.grown import Grown
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology

TRIED_DIMS = (8, *registry.CHECKED_DIMS)


def find_foldable(grown: Grown) -> dict[str, dict[str, str]]:
    """Finds the blueprints that would fold into a layer that learns, by what learns now.

    Args:
        grown: the model; whatever grows in it does not matter.

    Returns:
        Slot id -> blueprint -> dotted name of the layer; slots without one are left out.
    """
    sites, tied = {site.module for site in grown.sites.values()}, tied_tensors(grown.model)
    found = {}
    for slot, site in grown.sites.items():
        target = target_of(grown.model, site, tied, hooked=True)  # hooks may differ between ranks, as a logger's do
        if target is None or joined_before(site, target, sites):
            continue
        layer: Any = grown.model.get_submodule(target)
        if not layer.weight.requires_grad or not (layer.bias is None or layer.bias.requires_grad):
            continue
        entries = [registry.get(site.topology, name) for name in registry.names(site.topology)]
        offsets = {entry.name: has_offset(entry) for entry in entries}
        folds = [name for name, offset in offsets.items() if offset is False or (offset and layer.bias is not None)]
        if folds:
            found[slot] = dict.fromkeys(folds, target)
    return found


def has_offset(entry: Blueprint) -> bool | None:
    """Returns whether a blueprint's map A h + c can have a c that is not zero; None if the map is not affine."""
    return _has_offset(entry.topology, entry.name, str(entry.factory), tuple(sorted(entry.arguments.items())))


@functools.cache
def _has_offset(topology: Topology, name: str, factory: str, arguments: tuple[tuple[str, Any], ...]) -> bool | None:
    entry = registry.get(topology, name)
    dims = [dim for dim in TRIED_DIMS if entry.info_or_none(dim, 49) is not None]
    if not dims or issubclass(entry.factory, Mixing):
        return None
    seed = construct(name, dim=dims[0], topology=topology, key=0, dtype=torch.float32, backend=None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in seed.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))
    feature = torch.zeros(*(2,) * (topology.ndim - 1), dims[0], device="cpu")
    try:
        found = affine_map(as_graph(seed, (feature,), what=f"blueprint {name}"), dims[0])
    except ConfigError:  # what cannot be traced is not folded
        return None
    return None if found is None else bool(found[1].any())
