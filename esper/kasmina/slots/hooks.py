"""Hooks on the root that mark the beginning and the end of a forward, which a slot alone cannot know.

A slot that fires twice in one forward would add its delta twice. Outside of a root forward firing again is right:
activation checkpointing computes a region again in backward, a user calls a submodule by hand. So two hooks on the root
mark where a forward begins and ends, and an active slot notes that it fired. The marks are plain booleans with the same
values at the beginning of every forward, so that a compiler has nothing to recompile on. What slots went by (overrides,
class logits) is remembered with the tensors that a forward returned, for what backward computes again.

`nn.TransformerEncoderLayer` has a fused path in eval(). It leaves that path when any hook is registered in it, and then
rounds differently and does not support padding. So while all slots on or in such layers are idle, their hooks are taken
off for the length of the forward; while one is active, the fused path is off for all layers, so that all compute alike.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from esper.kasmina.axes.feature import tensors_in
from esper.kasmina.slots.beat import Beat
from esper.kasmina.slots.sites import is_compiled
from esper.kasmina.slots.slot import SeedSlot


@dataclass(slots=True)
class _Fused:
    """A slot whose site is, or lies in, a fused layer."""

    module: nn.Module
    holder: SeedSlot
    handle: RemovableHandle


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
    fused: list[_Fused] = field(default_factory=list)
    lifted: bool = False
    fast_path: bool | None = None

    def watch(self, model: nn.Module, name: str, holder: SeedSlot) -> None:
        """Registers the slot's hook on the module called ``name``."""
        self.beat.fired[holder.slot] = False
        self.holders.append(holder)
        module = model.get_submodule(name)
        handle = module.register_forward_hook(holder.hook)
        parts = name.split(".")
        above = [model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts) + 1)]
        if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in above):
            self.fused.append(_Fused(module, holder, handle))

    def begin(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Forward pre-hook of the root."""
        self.beat.begin()
        if torch.compiler.is_compiling():
            return
        self.beat.graded = torch.is_grad_enabled()
        if not self.fused:
            return
        self._restore()
        if all(entry.holder.idle for entry in self.fused) and not is_compiled(model):
            for entry in self.fused:
                entry.handle.remove()
            self.lifted = True
        else:
            self.fast_path = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)

    def end(self, *call: Any) -> None:  # one argument for all: a compiler then does not look into the output's tensors
        """Forward hook of the root; torch also calls it when the forward raised."""
        if not torch.compiler.is_compiling() and any(holder.seed is not None for holder in self.holders):
            self.beat.remember(list(tensors_in(call[-1])))
        self.beat.end()
        if self.fused and not torch.compiler.is_compiling():
            self._restore()

    def _restore(self) -> None:
        if self.lifted:
            for entry in self.fused:
                entry.handle = entry.module.register_forward_hook(entry.holder.hook)
            self.lifted = False
        if self.fast_path is not None:
            torch.backends.mha.set_fastpath_enabled(self.fast_path)
            self.fast_path = None
