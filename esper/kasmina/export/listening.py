"""What an exported seed that mixes positions reads of the call around its site: masks, and the host's cache.

A grown model has hooks for it (`esper.kasmina.slots.told`). A plain one has graphs, and a graph cannot branch on
whether a mask or a cache was given. So every question is asked in a form that None answers too, by builtins alone:

    getattr(mask, "eq", ones.__or__)(False)                what the mask shows, or ones without one
    getattr(cache, "__dict__", {}).setdefault(key, layer)  the seed's layer of this cache, or one that is thrown away

If another module than the site is told, a graph before it leaves what it was called with at the site.
"""

import importlib
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper.kasmina.axes.positions import CAUSAL, FREE, Mixing, Positions
from esper.kasmina.axes.site import Site
from esper.kasmina.export.same import Inputs
from esper.kasmina.export.tracing import as_graph
from esper.kasmina.slots.told import (
    CACHES,
    HIDDEN_KEYS,
    HIDDEN_PAIRS,
    Argument,
    attending,
    find_teller,
    layer_class,
)

WITHOUT = "call with use_cache=False"


def record(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function, or records the call if one of its arguments is being traced."""
    tracer = next((arg.tracer for arg in args if isinstance(arg, fx.Proxy)), None)
    if tracer is None:
        return function(*args)
    call = tracer.create_proxy("call_function", function, args, {})
    if function is not torch._assert:  # a graph that is unpickled is traced again: so these are then recorded, too
        call.node.meta["is_wrapped"] = True
    return call


@dataclass(frozen=True, slots=True)
class Listening:
    """How one seed reads its call.

    Fields:
        slot: slot id.
        causal: the host is causal there.
        path: from the module that is told down to the site, "" where they are one.
        arguments: of that module, each with whether the example gave it by its place.
        four: by argument, the mask has four axes; else it is [B, K].
        layer: class of a layer of the cache; None if the seed cannot keep anything in it.
        place: index of the seed's layer in it.
    """

    slot: str
    causal: bool
    path: str
    arguments: tuple[tuple[Argument, bool], ...]
    four: tuple[bool, ...]
    layer: type[Any] | None
    place: int

    @property
    def key(self) -> str:
        """Name of the seed's layer in the cache's attributes, and of what is left at the site."""
        return f"_grown_{self.slot}"

    @property
    def nothing(self) -> tuple[None, ...]:
        """What is read where nothing was given."""
        return (None,) * len(self.arguments)

    def read(self, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """The values of the arguments in a call."""
        return tuple(args[a.place] if placed else kwargs.get(a.name) for a, placed in self.arguments)

    def collect(self, module: Any, args: Any, kwargs: Any) -> tuple[Any, ...]:
        """The values of the arguments, in a hook of the site."""
        if not self.path:
            return self.read(args, kwargs)
        told = record(getattr, module, self.key, self.nothing)
        record(setattr, module, self.key, self.nothing)
        return tuple(told[index] for index in range(len(self.arguments)))

    def positions(self, told: Any) -> Positions:
        """What the seed is told."""
        masks = [(i, a.name) for i, (a, _) in enumerate(self.arguments) if a.name not in CACHES]
        caches = [i for i, (a, _) in enumerate(self.arguments) if a.name in CACHES]

        def visible(ones_QK: Any) -> Any:
            shown = [self._shown(told[i], name, self.four[i], ones_QK) for i, name in masks]
            together = shown[0]
            for other in shown[1:]:
                together = together & other
            return together

        memory = _Memory(self, told[caches[0]]) if caches else None
        return Positions(self.causal, visible if masks else None, memory)

    def _shown(self, mask: Any, name: str, four: bool, ones_QK: Any) -> Any:
        """Which positions a mask shows; see `esper.kasmina.slots.told.Told.visible`."""
        if name in HIDDEN_PAIRS:
            return record(getattr, mask, "eq", _or(ones_QK))(False)[None, None]
        if name in HIDDEN_KEYS:
            return record(getattr, mask, "eq", _or(ones_QK[:1]))(False)[:, None, None]
        axes = 4 if four else 2
        given = record(getattr, mask, "ndim", axes)
        said = f"slot {self.slot} was exported with a mask of {axes} axes as {name}; give it in that form"
        record(torch._assert, record(operator.eq, given, axes), said)
        if not four:
            return record(getattr, mask, "ne", _or(ones_QK[:1]))(False)[:, None, None]
        boolean = record(operator.eq, record(getattr, mask, "dtype", None), torch.bool)
        return record(getattr, mask, "eq", _or(ones_QK))(boolean)


def _or(ones: Any) -> Any:
    """A function of one argument that returns ``ones``, of False or of True."""
    return record(getattr, ones, "__or__", None)


class _Memory:
    """A seed's layer in the host's cache; where there is no cache, one for this call."""

    def __init__(self, how: Listening, cache: Any) -> None:
        self.how, self.cache = how, cache

    def extend(self, k_BHTD: Any, v_BHTD: Any) -> tuple[Any, Any]:
        how = self.how
        if how.layer is None or not how.causal:
            why = "not causal" if not how.causal else "exported without a cache"
            record(torch._assert, record(operator.is_, self.cache, None), f"slot {how.slot} is {why}; {WITHOUT}")
            return k_BHTD, v_BHTD
        cache = record(getattr, self.cache, "self_attention_cache", self.cache)
        library = record(getattr, cache, "no such name", how.layer.__module__)
        new = record(importlib.import_module, library).DynamicLayer()
        own = record(getattr, cache, "__dict__", {}).setdefault(how.key, new)
        seen = own.get_seq_length()
        held = record(getattr, cache, "get_seq_length", own.get_seq_length)()
        known = record(operator.contains, (seen, seen + k_BHTD.shape[-2]), held)
        said = f"the cache holds positions that the seed of slot {how.slot} has not seen; begin anew, or {WITHOUT}"
        record(torch._assert, known, said)
        layers = record(getattr, cache, "layers", [None] * how.place)
        enough = record(operator.ge, record(len, layers), how.place)
        record(torch._assert, enough, "make the cache by DynamicCache(config=model.config)")
        layers.__setitem__(slice(how.place, how.place + 1), [own])
        pair = own.update(k_BHTD, v_BHTD)
        return pair[0], pair[1]


def _bind(seed: nn.Module, how: Listening | None, fixed: Positions) -> None:
    """Makes a seed that mixes positions one whose forward takes x, and what was read; or x alone. In place."""
    kind = type(seed)
    if how is not None:
        positions = how.positions

        class Bound(kind):  # type: ignore[misc, valid-type]
            def forward(self, x: Any, told: Any) -> Any:
                return super().forward(x, positions(told))
    else:

        class Bound(kind):  # type: ignore[misc, valid-type, no-redef]
            def forward(self, x: Any) -> Any:
                return super().forward(x, fixed)

    Bound.__name__, Bound.__module__ = kind.__name__, kind.__module__
    seed.__class__ = Bound


class _Leave(nn.Module):
    """Traced to a graph that is a pre-hook of the module that is told: leaves what it was called with at the site."""

    def __init__(self, how: Listening) -> None:
        super().__init__()
        self._how = how

    def forward(self, module: Any, args: Any, kwargs: Any) -> None:
        how = self._how
        record(setattr, module.get_submodule(how.path), how.key, how.read(args, kwargs))


class Listeners:
    """The seeds of one export that mix positions, and how each reads its call.

    Args:
        model: the copy that is exported.
        sites: by slot.
        hosts: modules of esper in it, which are traced whole: there no hook is left that could read a call.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], hosts: Sequence[str]) -> None:
        self.model, self.sites, self.hosts = model, sites, hosts
        self._calls: dict[str, tuple[str, tuple[Argument, ...], Inputs]] = {}  # of the modules that are told
        self._known: dict[str, Listening] = {}

    def watch(self, slot: str, seed: nn.Module | None) -> list[Any]:
        """Notes, while the example runs, what the module is called with that is told; returns handles to remove."""
        site = self.sites[slot].module
        found = find_teller(self.model, site) if isinstance(seed, Mixing) else None
        if found is None or any(not name or f"{site}.".startswith(f"{name}.") for name in self.hosts):
            return []
        name, arguments = found

        def note(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls[slot] = (name, arguments, (args, kwargs))

        return [self.model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)]

    def bind(self, slot: str, seed: nn.Module) -> Listening | None:
        """Settles what a seed is told: what it reads of the call, or with None only whether the host is causal."""
        if not isinstance(seed, Mixing):
            return None
        site, how = self.sites[slot], None
        if slot in self._calls:
            how = self._known[slot] = self._describe(slot, *self._calls[slot])
        _bind(seed, how, CAUSAL if site.causal else FREE)
        return how

    def _describe(self, slot: str, name: str, arguments: tuple[Argument, ...], call: Inputs) -> Listening:
        args, kwargs = call
        values = {argument.name: argument.read(args, kwargs) for argument in arguments}
        four = tuple(not isinstance(values[a.name], Tensor) or values[a.name].ndim == 4 for a in arguments)
        cache: Any = next((attending(values[name]) for name in CACHES if values.get(name) is not None), None)
        lazy = getattr(cache, "layer_class_to_replicate", None) is not None
        layer = None if cache is None or lazy else layer_class(cache)
        own = 0 if layer is None else len(cache.layers) + sum(other.layer is not None for other in self._known.values())
        placed = tuple((a, a.name not in kwargs and a.place < len(args)) for a in arguments)
        path = self.sites[slot].module[len(name) :].removeprefix(".")
        return Listening(slot, self.sites[slot].causal, path, placed, four, layer, own)

    def prepare(self, slot: str) -> bool:
        """Registers what leaves the call at the site, where another module is told; returns whether a seed listens."""
        how = self._known.get(slot)
        if how is not None and how.path:
            name = self._calls[slot][0]
            graph = as_graph(_Leave(how), (None, (), {}), what=f"the call of module {name!r}")
            self.model.get_submodule(name).register_forward_pre_hook(graph, with_kwargs=True)
        return how is not None
