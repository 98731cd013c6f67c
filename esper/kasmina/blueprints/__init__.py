"""Blueprints, the networks that a seed may be: the registry, and the built-in ones, which register on import."""

from esper.kasmina.axes.positions import Mixing, Positions
from esper.kasmina.blueprints import feature_map, sequence, signal, vector, whole  # noqa: F401, they register
from esper.kasmina.blueprints.registry import (
    Blueprint,
    all_names,
    blueprint,
    catalogue,
    check_formulas,
    get,
    index_of,
    info,
    load_plugins,
    name_at,
    names,
    registry_digest,
)

__all__ = [
    "Blueprint",
    "Mixing",
    "Positions",
    "all_names",
    "blueprint",
    "catalogue",
    "check_formulas",
    "get",
    "index_of",
    "info",
    "load_plugins",
    "name_at",
    "names",
    "registry_digest",
]
