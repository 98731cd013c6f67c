"""A grown model's copy, and how everything that is not the model's own comes off it: slots, hooks, compiled regions."""

import copy
from functools import partial
from typing import Any

from torch import nn

from esper.kasmina.slots.hooks import RootHooks
from esper.kasmina.slots.regions import strip
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import SeedSlot


def _from_esper(function: Any) -> bool:
    """Whether a hook or another callable is a function of ours, bound or partly applied as it may be."""
    while isinstance(function, partial):
        function = function.func
    places = (type(getattr(function, "__self__", None)).__module__, getattr(function, "__module__", None))
    return any(str(place).partition(".")[0] == "esper" for place in places)


def _nothing(*args: Any) -> None:
    """A hook that looks and does nothing."""


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy in eval() that computes the same eagerly, with slots of its own.

    Hooks of ours that only look (a teacher's, for its features) stay behind with what they look at.
    """
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values() if _from_esper(hook)]
    looking = [hook for hook in hooks if not isinstance(getattr(hook, "__self__", None), SeedSlot | RootHooks)]
    return strip(copy.deepcopy(model, {id(hook): _nothing for hook in looking})).eval()


def strip_slots(model: nn.Module) -> None:
    """Takes the slots and every hook of ours off a copy, in place."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if _from_esper(hook)]:
                del hooks[key]
                module._forward_hooks_always_called.pop(key, None)
        if _from_esper(vars(module).get("injection_points")):  # of a custom host, see `esper.kasmina.hosts.custom`
            del module.injection_points
    delattr(model, CONTAINER)
