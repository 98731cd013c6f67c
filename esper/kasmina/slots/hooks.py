"""Hooks on the root that mark the beginning and the end of a forward, which a slot alone cannot know.

A slot that fires twice in one forward would add its delta twice. Outside of a root forward firing again is right:
activation checkpointing computes a region again in backward, a user calls a submodule by hand. So two hooks on the root
mark where a forward begins and ends, and an active slot notes that it fired. The marks are plain booleans with the same
values at the beginning of every forward, so that a compiler has nothing to recompile on. What slots went by (overrides,
class logits) is remembered with the tensors that a forward returned, for what backward computes again.

`nn.TransformerEncoderLayer` has a fused path in eval(). It leaves that path when any hook is registered in it, and then
rounds differently and does not support padding. So while all slots on or in such layers are idle, their hooks are taken
off for the length of the forward; while one is active, the fused path is off for all layers, so that all compute alike.
They come back to their place among the hooks of the module: one of the user's that was registered after attach runs
after the slot's, and sees the feature with the seed.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from esper.kasmina.axes.dryrun import STEADY
from esper.kasmina.axes.feature import replace_tensors, tensors_in
from esper.kasmina.axes.positions import Mixing
from esper.kasmina.slots.beat import Beat
from esper.kasmina.slots.blend import HostOnly
from esper.kasmina.slots.phases import Phase
from esper.kasmina.slots.sites import is_compiled
from esper.kasmina.slots.slot import SeedSlot
from esper.kasmina.slots.told import CACHES, Argument, Told, find_teller
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError


class Teller:
    """Forward pre-hook of the module that tells a slot what it is called with; deep copies and pickles with the model.

    Args:
        holder: the slot.
        arguments: of the module; see `esper.kasmina.slots.told.find_teller`.
    """

    def __init__(self, holder: SeedSlot, arguments: tuple[Argument, ...]) -> None:
        self.holder, self.arguments = holder, arguments

    def tell(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes masks and cache for a slot at work that needs them; forgets the last ones for any other."""
        told, holder = None, self.holder
        needs = isinstance(holder.seed, Mixing) or Operator.GATE in (holder.operator, holder.fades_from)
        if needs and (torch.compiler.is_compiling() or not holder.idle):
            given = {argument.name: argument.read(args, kwargs) for argument in self.arguments}
            masks = tuple((name, mask) for name, mask in given.items() if isinstance(mask, Tensor))
            cache = next((given[name] for name in CACHES if given.get(name) is not None), None)
            told = Told(masks, cache) if masks or cache is not None else None
        if told is not None or holder.told is not None:
            holder.told = told


def _learns(holder: SeedSlot) -> bool:
    """Whether a forward with gradients, as things are, is one in which the seed learns."""
    override = holder.overridden
    at_work = holder.phase is not Phase.OFF if override is None else override != 0.0
    return at_work and holder.seed is not None and any(p.requires_grad for p in holder.seed.parameters())


def _describe_missing(holder: SeedSlot) -> str:
    """What to say where data parallel training would wait for a gradient that does not come."""
    assert holder.site is not None
    return (
        f"site {holder.site.module!r} of slot {holder.slot} did not run in a forward in which its seed "
        f"learns: {STEADY}, or allow it by find_unused (world.find_unused=true, Session(find_unused=True))"
    )


def _take_part(output: Any, skipped: list[SeedSlot]) -> Any:
    """The output, whose backward gives the parameters of these slots a gradient of zeros.

    Data parallel training waits for the gradient of every parameter that learns, from every rank: where a site was left
    out it is zero, so that the mean over ranks is exact.
    """
    own = [parameter for holder in skipped for parameter in holder.parameters() if parameter.requires_grad]
    floats = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    joined = {id(tensor) for tensor in floats if tensor.requires_grad} or {id(tensor) for tensor in floats}
    if not joined:
        raise ConfigError(
            f"slot {skipped[0].slot}: its site was left out, and the model returns no tensor by which the seed could "
            "take part; return the loss or the logits"
        )
    return replace_tensors(output, lambda t: HostOnly.apply(t, *own) if id(t) in joined else t)


@dataclass(slots=True)
class _Watched:
    """A module with the hooks by which it serves a slot.

    Fields:
        module: that returns the slot's feature.
        holder: the slot.
        told_by: the module that tells the slot what it is called with, and its hook; None if there is none.
        handles: of the hooks now registered.
        behind: keys of the module's hooks that run after the slot's, while that is taken off.
    """

    module: nn.Module
    holder: SeedSlot
    told_by: tuple[nn.Module, Teller] | None
    handles: list[RemovableHandle] = field(default_factory=list)
    behind: tuple[int, ...] = ()

    def register(self) -> None:
        """Registers the hooks, that on the feature at its old place."""
        self.handles = [self.module.register_forward_hook(self.holder.hook, with_kwargs=True)]
        for key in self.behind:
            if key in self.module._forward_hooks:
                self.module._forward_hooks.move_to_end(key)  # type: ignore[attr-defined]  # an OrderedDict
        if self.told_by is not None:
            module, teller = self.told_by
            self.handles.append(module.register_forward_pre_hook(teller.tell, with_kwargs=True))

    def remove(self) -> None:
        """Takes the hooks off."""
        keys = list(self.module._forward_hooks)
        self.behind = tuple(keys[keys.index(self.handles[0].id) + 1 :])
        for handle in self.handles:
            handle.remove()


@dataclass(slots=True)
class RootHooks:
    """Marks root forwards; deep copies and pickles with the model that holds it.

    Fields:
        beat: the state shared with every slot.
        holders: the slots.
        fused: slots on or in fused layers.
        lifted: the hooks of those slots are off.
        fast_path: torch's fused-path setting to restore; None where it was not changed.
    """

    beat: Beat = field(default_factory=Beat)
    holders: list[SeedSlot] = field(default_factory=list)
    fused: list[_Watched] = field(default_factory=list)
    lifted: bool = False
    fast_path: bool | None = None

    def watch(self, model: nn.Module, name: str, holder: SeedSlot) -> None:
        """Registers the slot's hook on the module called ``name``."""
        self.beat.fired[holder.slot] = False
        self.holders.append(holder)
        assert holder.site is not None
        found = find_teller(model, name) if holder.site.topology.has_length else None
        told_by = None if found is None else (model.get_submodule(found[0]), Teller(holder, found[1]))
        watched = _Watched(model.get_submodule(name), holder, told_by)
        watched.register()
        parts = name.split(".")
        above = [model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts) + 1)]
        if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in above):
            self.fused.append(watched)

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the root."""
        self.beat.begin()
        if torch.compiler.is_compiling():
            return
        self.beat.graded = torch.is_grad_enabled()
        if not self.fused:
            return
        self._restore()
        hearing = self.beat.weights is not None  # a staged seed waits for the size of the feature in such a forward
        idle = all(e.holder.idle and not (hearing and e.holder.heard.listening) for e in self.fused)
        if idle and not is_compiled(model):
            for entry in self.fused:
                entry.remove()
            self.lifted = True
        else:
            self.fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)

    def end(self, *call: Any) -> Any:  # one argument for all: a compiler then does not look into the output's tensors
        """Forward hook of the root; torch also calls it when the forward raised.

        Returns:
            The model's output, where a seed takes part in it whose site was left out; None where it stays as it is.

        Raises:
            ConfigError: a site did not run although its seed learns.
        """
        if torch.compiler.is_compiling():
            self.beat.end()
            return None
        planted = [holder for holder in self.holders if holder.seed is not None]
        absent = self._absent(planted) if call[-1] is not None else []
        missing = next((h for h in absent if not h.site.may_skip and not self.beat.find_unused), None)  # type: ignore[union-attr]
        skipped = [holder for holder in absent if holder.site is not None and holder.site.may_skip]
        output = _take_part(call[-1], skipped) if skipped and missing is None else None
        if planted:
            told = {holder.slot: holder.told for holder in planted if holder.told is not None}
            self.beat.remember(list(tensors_in(call[-1] if output is None else output)), told)
        self.beat.end()
        if self.fused:
            self._restore()
        if missing is not None:
            raise ConfigError(_describe_missing(missing))
        return output

    def _absent(self, planted: list[SeedSlot]) -> list[SeedSlot]:
        """The slots whose seed learns and whose site did not run in the forward that ends."""
        if not self.beat.graded:
            return []
        return [holder for holder in planted if not self.beat.fired[holder.slot] and _learns(holder)]

    def _restore(self) -> None:
        if self.lifted:
            for entry in self.fused:
                entry.register()
            self.lifted = False
        if self.fast_path is not None:
            torch.backends.mha.set_fastpath_enabled(self.fast_path)
            self.fast_path = None
