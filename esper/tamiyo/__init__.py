"""Controllers: they decide what grows, from the agreed observation alone.

Importing the package registers every kind; `build_controller` builds a controller from its config.
"""

from esper.tamiyo import custom, heuristic, none, random, schedule
from esper.tamiyo.policy import config as policy
from esper.tamiyo.registry import build_controller, controller_config_class, controller_kinds

__all__ = [
    "build_controller",
    "controller_config_class",
    "controller_kinds",
    "custom",
    "heuristic",
    "none",
    "policy",
    "random",
    "schedule",
]
