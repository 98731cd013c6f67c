"""Copies a grown model, and takes off the copy what is not the model's own: slots, hooks, compiled regions."""

import copy
from functools import partial
from typing import Any

import torch
from torch import nn

from esper.kasmina.slots.hooks import RootHooks
from esper.kasmina.slots.regions import strip
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import SeedSlot


def is_from_esper(function: Any) -> bool:
    """Whether a hook or another callable is a function of esper, also when it is bound or partly applied."""
    while isinstance(function, partial):
        function = function.func
    places = (type(getattr(function, "__self__", None)).__module__, getattr(function, "__module__", None))
    return any(str(place).partition(".")[0] == "esper" for place in places)


def _do_nothing(*args: Any) -> None:
    """A hook that does nothing."""


def copy_model(model: nn.Module) -> nn.Module:
    """Returns a deep copy in eval() that computes the same eagerly, with its own slots.

    Hooks of esper that only look (a teacher's, for its features) are left out, with the objects that they belong to.
    """
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values() if is_from_esper(hook)]
    looking = [hook for hook in hooks if not isinstance(getattr(hook, "__self__", None), SeedSlot | RootHooks)]
    return strip(deep_copy(model, {id(hook): _do_nothing for hook in looking})).eval()


def deep_copy(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """`copy.deepcopy` of a model that may hold computed tensors.

    A hook that computes a weight before each forward (old-style weight_norm and spectral_norm, pruning masks) leaves
    the last one at its module, and deepcopy refuses a tensor with a history. The copy gets its value; the copied hook
    computes it anew.

    Args:
        model: to copy.
        memo: as of `copy.deepcopy`.
    """
    return copy.deepcopy(model, {**(memo or {}), **computed_tensors(model)})


def computed_tensors(model: nn.Module) -> dict[int, Any]:
    """A memo for `copy.deepcopy` of whatever holds the model: the values of its computed tensors, see `deep_copy`."""
    held = [tensor for module in model.modules() for tensor in (*vars(module).values(), *module._buffers.values())]
    return {id(t): t.detach().clone() for t in held if isinstance(t, torch.Tensor) and not t.is_leaf}


def strip_slots(model: nn.Module) -> None:
    """Takes the slots and every hook of esper off a copy, in place."""
    for module in model.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if is_from_esper(hook)]:
                del hooks[key]
                for known in (
                    module._forward_hooks_always_called,
                    module._forward_hooks_with_kwargs,
                    module._forward_pre_hooks_with_kwargs,
                ):
                    known.pop(key, None)
        if is_from_esper(vars(module).get("injection_points")):  # set by `esper.kasmina.hosts.custom`
            del module.injection_points
    delattr(model, CONTAINER)
