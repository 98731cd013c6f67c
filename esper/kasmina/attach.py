r"""Slots on a model: one public forward hook per site, all slots in one container at the model's root.

    grown = esper.attach(model, r"blocks\.\d+", example)      # or {"r0c0": "blocks.0"}
    grown.status()

The host's own state-dict keys stay what they were; a planted seed adds ``esper_slots.<slot>.seed.*``. (A wrapper would
rename the host's keys, a class swap breaks fused paths and pickling, a hook that holds an unregistered seed hides its
parameters from the optimizer and from DDP without an error.)
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from esper.kasmina.axes.site import Site
from esper.kasmina.export.exporter import export
from esper.kasmina.export.native import native as make_native
from esper.kasmina.slots.grown import Grown, Slots
from esper.kasmina.slots.hooks import RootHooks
from esper.kasmina.slots.sites import CONTAINER, find_sites, is_compiled
from esper.kasmina.slots.slot import SeedSlot
from esper.kasmina.slots.status import status_table
from esper.kasmina.slots.unfit import check_model, check_sites, write_out_expanded
from esper.leyline.errors import ConfigError


class Attached(Grown):
    """The handle that `attach` returns: a `Grown` with the methods that people call."""

    def status(self, console: Console | None = None) -> Table:
        """Prints and returns a table of the slots: site, layout, dim, phase, alpha, parameters of the seed.

        Args:
            console: where to print; None for standard output.
        """
        table = status_table(self)
        (console or Console()).print(table)
        return table

    def export(
        self, example: Any = None, *, fold: bool = True, partial: bool = False, native: bool = False
    ) -> nn.Module:
        """Returns a plain module that computes what this model computes now, without a class of esper.

        See `esper.kasmina.export`.

        Args:
            example: one batch of inputs to trace and to check with; None for the one given to `attach`.
            fold: make linear seeds and scales part of the weights beside them; with False the result is equal bit for
                bit.
            partial: also export seeds with an alpha between 0 and 1, as they are now.
            native: return the host's own class with more blocks, where all that grew is copies of its blocks; see
                `esper.kasmina.export.native`.
        """
        if native:
            return make_native(self, example).module
        return export(self, example, fold=fold, partial=partial).module


def _check_root(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"attach: got {type(model).__name__}, expected a model, an nn.Module")
    if isinstance(model, nn.parallel.DistributedDataParallel) or is_compiled(model):
        raise ConfigError("attach comes before torch.compile and before DistributedDataParallel: pass the bare model")
    if hasattr(model, CONTAINER):
        raise ConfigError("this model already has slots; attach once, with all sites")
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError("the model is a torch.jit.ScriptModule, which takes no hooks: attach before torch.jit")
    check_model(model)
    plain = type(model).forward is nn.Sequential.forward
    container = isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict) and not plain
    if container or isinstance(model, nn.TransformerEncoderLayer):
        what = f"{type(model).__name__} is itself a {'container' if container else 'fused layer'}"
        raise ConfigError(f"the root {what}: make it a child of a module of your own, attach there")


def attach_described(model: nn.Module, described: Mapping[str, Site], example: Any = None) -> Attached:
    """Puts empty slots at sites that are already described, as in a checkpoint's record; needs no dry run.

    Raises:
        ConfigError: the model has no such submodule, or attach came too late (after torch.compile, DDP or attach).
    """
    _check_root(model)
    known = dict(model.named_modules())
    for slot, site in described.items():
        if site.module not in known:
            raise ConfigError(f"slot {slot}: the model has no module {site.module!r}; is it the recorded host?")
    check_sites(model, {site.module: f"site {site.module!r} of slot {slot}" for slot, site in described.items()})
    write_out_expanded(model)
    root_hooks = RootHooks()
    container = Slots({slot: SeedSlot(slot, site, root_hooks.beat) for slot, site in described.items()})
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model.add_module(CONTAINER, container.to(device))
    model.register_forward_pre_hook(root_hooks.begin)
    for slot, site in described.items():
        holder = container[slot]
        assert isinstance(holder, SeedSlot)
        root_hooks.watch(model, site.module, holder)
    numbers = [getattr(module, "layer_idx", None) for module in model.modules()]  # as transformers numbers its layers
    root_hooks.beat.host_layers = max((number + 1 for number in numbers if isinstance(number, int)), default=0)
    model.register_forward_hook(root_hooks.end, always_call=True)
    return Attached(model, described, example)


def attach(
    model: nn.Module,
    sites: Mapping[str, str] | str,
    example: Any,
    *,
    layout: Mapping[str, str] | str | None = None,
    may_skip: Collection[str] | bool = False,
) -> Attached:
    """Puts empty slots on a model, in place. Attach before compile and before DDP.

    Args:
        model: any `nn.Module`.
        sites: slot id -> dotted name of the submodule whose output holds the feature there; or a regular expression
            that matches whole names of submodules, which then get the ids r0c0, r1c0, ... in the order of execution.
        example: one batch of the model's input: the one input, a tuple of inputs, or a dict of keyword inputs (an
            input that is itself a dict goes into a tuple). Shapes are read off it, and what their axes mean, by
            forwards with another batch size, other lengths and other values (`esper.kasmina.axes`).
        layout: slot id -> the axes of its feature, a letter each, such as {"r0c0": "TBC"}; or one for all slots. It is
            not looked for where it is given.
        may_skip: slot ids, or True for all: sites that a forward in train() may leave out (layer drop, a branch). In
            eval() they run. A seed there takes no step where its site ran on no rank.

    Returns:
        The handle to the model and its slots.

    Raises:
        ConfigError: unknown site, a pattern without a match, a site that does not fire exactly once or returns no
            tensor, axes whose meaning no forward tells, a model that cannot grow (`esper.kasmina.slots.unfit`), or
            attach came too late (after torch.compile, DDP or attach).
    """
    _check_root(model)
    write_out_expanded(model)
    return attach_described(model, find_sites(model, sites, example, layout, may_skip), example)
