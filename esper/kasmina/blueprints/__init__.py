"""What a seed may be: the registry, and the built-in blueprints it holds once this package is imported."""

from esper.kasmina.blueprints import feature_map, sequence, vector  # noqa: F401, importing them registers
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
