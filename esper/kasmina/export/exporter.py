"""Turns a grown model into a plain one that computes the same, from modules of torch and of the model's authors alone.

    seed at alpha 0 or idle      left out
    seed in blend                a `torch.fx.GraphModule` around torch modules, a hook on the host's own submodule
    linear seed at a Linear      folded into that layer (`esper.kasmina.export.folding`)
    host class of esper          traced whole into a `torch.fx.GraphModule`

All of it is done on a deep copy, which is then checked: it computes what the grown model computes, bit for bit if
nothing was folded, else to rounding. The host's keys stay; those of seeds move from ``esper_slots.`` to ``grown.``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from esper.kasmina.axes.block import Call, OwnBlock
from esper.kasmina.axes.feature import take
from esper.kasmina.export.copying import copy_model, strip_slots
from esper.kasmina.export.folding import affine_map, fold_into, fold_scale, is_zero, joined_before, target_of
from esper.kasmina.export.join import (
    JOINS,
    ONLY_FULL,
    Factor,
    add,
    compute_delta,
    current_alphas,
    join_graph,
    move_to,
    refuse,
)
from esper.kasmina.export.listening import Listeners, Listening
from esper.kasmina.export.record import Exported, ExportedSlot, Way
from esper.kasmina.export.same import Inputs, check_same, inputs_for, run_plain, same_bits
from esper.kasmina.export.tracing import as_graph, esper_modules, is_below, is_torch, package_of, use_twins
from esper.kasmina.precision import as_wide
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import SeedSlot
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError, ExportError

GROWN = "grown"


def _free_name(module: nn.Module) -> str:
    """Returns a child's name that the module does not use yet: grown, grown_2, ..."""
    names = (GROWN, *(f"{GROWN}_{number}" for number in range(2, 10_000)))
    return next(name for name in names if not hasattr(module, name))


def _hold(module: nn.Module, joins: Mapping[str, nn.Module]) -> str:
    """Puts graphs by slot into a new child; returns its name. The child passes its input on, as a Sequential needs."""
    holder, name = nn.Identity(), _free_name(module)
    for slot, join in joins.items():
        holder.add_module(slot, join)
    module.add_module(name, holder)
    return name


def _holder(model: nn.Module, slot: str) -> SeedSlot:
    holder = model.get_submodule(f"{CONTAINER}.{slot}")
    assert isinstance(holder, SeedSlot)
    return holder


class _Exporter:
    """Runs one export, step by step; everything here belongs to the copy."""

    def __init__(self, grown: Grown, example: Any, fold: bool) -> None:
        self.levels, self.sites, self.fold = current_alphas(grown), grown.sites, fold
        self.example = inputs_for(grown.model, example)
        self.model = copy_model(grown.model)
        for slot in self.levels:
            if (holder := _holder(self.model, slot)).operator in ONLY_FULL:
                holder.operator, holder.gate = Operator.ADD, None  # at full alpha they equal ADD, bit for bit
        self.inexact = False
        self.outputs: dict[str, Any] = {}  # by slot, in the order of execution
        self.calls: dict[str, Call] = {}
        self.inputs: dict[str, Inputs] = {"": self.example}
        self.joins: dict[str, nn.Module] = {}
        self.ways: dict[str, tuple[Way, str | None]] = {}
        self.listeners = Listeners(self.model, self.sites, [n for n in esper_modules(self.model) if n != CONTAINER])

    def observe(self) -> Any:
        """Runs the grown model on the example; notes what sites return and what inputs modules of esper get."""
        handles = []
        for slot, level in self.levels.items():
            if level > 0.0:
                site = self.model.get_submodule(self.sites[slot].module)
                note_output = lambda _m, args, kwargs, out, slot=slot: self._note_output(slot, args, kwargs, out)  # noqa: E731
                handles.append(site.register_forward_hook(note_output, with_kwargs=True))
                handles += self.listeners.watch(slot, _holder(self.model, slot).seed)
        for name in esper_modules(self.model):
            part = self.model.get_submodule(name)
            if name and not is_below(name, CONTAINER) and name != CONTAINER:
                note = lambda _m, args, kwargs, name=name: self._note_inputs(name, args, kwargs)  # noqa: E731
                handles.append(part.register_forward_pre_hook(note, with_kwargs=True))
        # If all features need a gradient, esper's GroupNorm and torch's compute the same way (see blueprints.parts).
        learning = {p: p.requires_grad for p in self.model.parameters()}
        try:
            for parameter in learning:
                parameter.requires_grad_(parameter.is_floating_point())
            with torch.enable_grad():
                return run_plain(self.model, self.example)
        finally:
            for parameter, wanted in learning.items():
                parameter.requires_grad_(wanted)
            for handle in handles:
                handle.remove()

    def _note_output(self, slot: str, args: Any, kwargs: Any, output: Any) -> None:
        self.outputs[slot], self.calls[slot] = output, Call(args, kwargs)

    def _note_inputs(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs.setdefault(name, tree_map_only(Tensor, Tensor.detach, (args, kwargs)))

    def convert_seeds(self) -> None:
        """Folds each active seed into the host, or makes it a graph in ``joins``, to be placed by `assemble`."""
        holders = {slot: _holder(self.model, slot) for slot in self.levels}
        seeds: dict[str, Any] = {slot: holder.seed for slot, holder in holders.items()}
        strip_slots(self.model)
        use_twins(self.model)
        self.ways = dict.fromkeys(seeds, (Way.LEFT_OUT, None))
        for slot, output in self.outputs.items():
            site = self.sites[slot]
            feature = as_wide(site.turned(take(output, site.place).detach()), seeds[slot])
            listening = self.listeners.bind(slot, seeds[slot])
            own = isinstance(seeds[slot], OwnBlock)
            whole = self._block_of(slot, seeds[slot]) if own else seeds[slot]
            seed = self._as_torch(slot, whole, feature, listening)
            formula, factor_of = JOINS[holders[slot].operator]
            formula = move_to if own else formula
            factor = factor_of(torch.tensor(self.levels[slot], device=holders[slot].alpha.device), holders[slot])
            if self.fold and not own:
                if is_zero(seed):
                    self.inexact = True
                    continue
                if formula is add and self._fold(slot, seed, factor):
                    continue
                if fold_scale(seed, factor if formula is add else 1.0) is not None:
                    self.inexact = True
                    factor = 1.0 if formula is add else factor
            self.joins[slot] = join_graph(seed, formula, factor, output=output, site=site, listening=listening)

    def _block_of(self, slot: str, seed: OwnBlock) -> nn.Module:
        """The block of a copy that takes the feature alone."""
        if self.calls[slot].has_further(self.outputs[slot]) if self.sites[slot].place is None else True:
            raise ConfigError(
                f"the copy in slot {slot} is called with more than the feature, or returns more, so that it cannot be "
                "a graph; where it is a block of a list, export --native makes it one more"
            )
        return seed.block

    def _fold(self, slot: str, seed: nn.Module, factor: Factor) -> bool:
        """Folds the seed into the Linear that makes the feature; returns whether that was possible."""
        site = self.sites[slot]
        target = target_of(self.model, site)
        linear = None if target is None else affine_map(seed, site.dim)
        if target is None or linear is None:
            return False
        if joined_before(site, target, {self.sites[other].module for other in self.joins}):
            return False
        layer: Any = self.model.get_submodule(target)
        if not fold_into(layer, factor, *linear):
            return False
        self.ways[slot], self.inexact = (Way.FOLDED, target), True
        return True

    def _as_torch(self, slot: str, seed: nn.Module, feature: Tensor, listening: Listening | None) -> nn.Module:
        """Returns the seed if it is made of torch's classes, else a graph that computes the same."""
        if is_torch(seed):
            return seed
        told = () if listening is None else (listening.nothing,)
        before = compute_delta(seed, feature, *told)
        moved = use_twins(seed) or listening is not None
        self.inexact |= moved
        graph = as_graph(seed, (feature, *told), what=f"the seed in slot {slot}")
        if not moved and not same_bits(before, compute_delta(graph, feature)):
            raise ConfigError(
                f"the seed in slot {slot} cannot be exported: traced, {type(seed).__name__} computes something else; "
                "its forward must depend on its input, its parameters and constants alone"
            )
        return graph

    def assemble(self) -> None:
        """Puts the seeds' graphs in their places, and replaces modules of esper by graphs."""
        roots = esper_modules(self.model)
        waiting = dict(self.joins)
        for root in roots:
            part = self.model.get_submodule(root)
            inside = {slot: join for slot, join in waiting.items() if is_below(self.sites[slot].module, root)}
            if inside:
                self._record(_hold(part, inside), root, inside)
            joins = {self.model.get_submodule(self.sites[slot].module): waiting.pop(slot) for slot in inside}
            if root not in self.inputs:
                raise ConfigError(f"module {root!r} does not run on the example, so that it cannot be exported")
            args, kwargs = self.inputs[root]
            graph = as_graph(part, args, kwargs, what=f"module {root!r}" if root else "the model", joins=joins)
            if root:
                parent, _, last = root.rpartition(".")
                setattr(self.model.get_submodule(parent), last, graph)
            else:
                self.model = graph
        if waiting:
            self._record(_hold(self.model, waiting), "", waiting)
            for slot, join in waiting.items():
                self._hook(slot, join)

    def _hook(self, slot: str, join: nn.Module) -> None:
        """Registers the graph as a forward hook; padded batches then stay plain: it cannot take nested tensors."""
        module = self.sites[slot].module
        self.model.get_submodule(module).register_forward_hook(join, with_kwargs=self.listeners.prepare(slot))
        parts = module.split(".")
        for depth in range(len(parts)):
            above = self.model.get_submodule(".".join(parts[:depth]))
            if isinstance(above, nn.TransformerEncoder):
                above.use_nested_tensor = False

    def _record(self, name: str, root: str, joins: Mapping[str, nn.Module]) -> None:
        for slot in joins:
            self.ways[slot] = (Way.MODULE, ".".join(part for part in (root, name, slot) if part))

    def key_map(self, before: list[str]) -> dict[str, str | None]:
        """Returns the new key of each entry of the grown model's state dict, None where it has gone."""
        after = set(self.model.state_dict())
        keys: dict[str, str | None] = {}
        for key in before:
            moved = key
            if is_below(key, CONTAINER):
                slot, _, rest = key.removeprefix(f"{CONTAINER}.").partition(".")
                moved = f"{self.ways[slot][1]}.{rest}" if self.ways[slot][0] is Way.MODULE else ""
            keys[key] = moved if moved in after else None
        return keys


def export(grown: Grown, example: Any = None, *, fold: bool = True, partial: bool = False) -> Exported:
    """Makes a plain model that computes what ``grown`` computes now; ``grown`` is left as it is.

    Args:
        grown: any grown model, at any moment of its life.
        example: one batch of inputs as for `esper.kasmina.attach.attach`; None for the one given there.
        fold: make linear seeds and scales part of the weights beside them; with False the result is equal bit for bit.
        partial: also export seeds with an alpha between 0 and 1, as they are now.

    Raises:
        ConfigError: a seed whose ramp has not ended (without ``partial``; if cross-faded or gated, always), named in
            the text; or a seed or a host of esper that cannot be traced.
        ExportError: the exported model does not compute the same.
    """
    if not hasattr(grown, "owner_parameters"):
        raise ConfigError(f"export: got {type(grown).__name__}, expected what esper.attach returned (session.grown)")
    example = grown.example if example is None else example
    if example is None:
        raise ConfigError("export needs an example of the model's input: grown.export(example)")
    levels = current_alphas(grown)
    refuse(grown, levels, partial)
    exporter = _Exporter(grown, example, fold)
    before = exporter.observe()
    exporter.convert_seeds()
    exporter.assemble()
    model = exporter.model.eval()
    left = [name or "the root" for name, module in model.named_modules() if package_of(module) == "esper"]
    if left:
        raise ExportError(f"modules of esper are left: {', '.join(left[:3])}")
    with torch.enable_grad():
        after = run_plain(model, exporter.example)
    check_same(before, after, exact=not exporter.inexact)
    slots = tuple(
        ExportedSlot(
            slot=slot,
            site=grown.sites[slot].module,
            place=grown.sites[slot].place,
            layout=grown.sites[slot].layout,
            causal=grown.sites[slot].causal,
            seed=type(grown.slots[slot].seed).__name__,
            alpha=level,
            operator=grown.slots[slot].operator.name,
            way=exporter.ways[slot][0],
            where=exporter.ways[slot][1],
            parameters=grown.seed_parameters(slot),
        )
        for slot, level in levels.items()
    )
    return Exported(
        module=model,
        slots=slots,
        keys=exporter.key_map(list(grown.model.state_dict())),
        example=exporter.example,
        output=tree_map_only(Tensor, Tensor.detach, after),
        exact=not exporter.inexact,
    )
