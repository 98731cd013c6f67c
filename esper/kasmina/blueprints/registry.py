"""The registry of blueprints, the networks that a seed may be, by topology and name.

A blueprint is an ``nn.Module`` class taking ``dim`` and typed keyword arguments with defaults; ``forward(x)`` returns a
*delta* of x's shape and memory format (the slot computes ``h + alpha * delta(x)``). To add one:

1. Write the class, beginning with a norm where scale matters and ending in `parts.LayerScale`. No BatchNorm, no fixed
   resolution, no zero init, no random numbers but torch's. If one position of a SEQUENCE or a SIGNAL may see another,
   subclass `Mixing` and heed what its forward is told, causal or not.
2. Register it with its exact parameter count and its FLOPs::

       @blueprint("shift", topology=Topology.VECTOR,
                  parameters=lambda dim, gain: dim, flops=lambda dim, positions, gain: 0)
       class Shift(nn.Module):
           def __init__(self, dim: int, *, gain: float = 1.0) -> None: ...

   Formulas get every keyword argument, by name. FLOPs are multiply-adds times two of the convolutions, matrix products
   and attention products of one forward over one sample, as torch's FlopCounterMode counts them; ``positions`` is H*W
   or T. Decorators stack: one class under several names, each with its own ``arguments``.
3. Raise ``version`` when the same name comes to mean another network: ranks and checkpoints compare `registry_digest`.
4. From another package: name the module in entry-point group ``esper.blueprints``; importing it must register.
"""

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

import torch
from torch import nn

from esper.kasmina.blueprints.entry import Blueprint, Chooser, read_arguments
from esper.kasmina.blueprints.mixing import check_mixing, mixes, reach_of
from esper.leyline.errors import ConfigError
from esper.leyline.legality import COPY
from esper.leyline.observation import BlueprintInfo
from esper.leyline.plain import digest62
from esper.leyline.topology import Reach, Topology

ENTRY_POINTS = "esper.blueprints"
CHECKED_DIMS = (1, 2, 3, 8, 12, 64)

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_REGISTRY: dict[tuple[Topology, str], Blueprint] = {}

Module = TypeVar("Module", bound=type[nn.Module])


def blueprint(
    name: str,
    *,
    topology: Topology,
    parameters: Callable[..., int],
    flops: Callable[..., int],
    version: int = 1,
    min_dim: int = 1,
    reach: Reach | None = None,
    arguments: Mapping[str, Any] | None = None,
    normalises: Callable[[int, int], int] | None = None,
    backend: Chooser | None = None,
    on_request: bool = False,
) -> Callable[[Module], Module]:
    """Class decorator that registers a blueprint; see the module's docstring for the checklist.

    Args:
        name: lower case, digits and underscores; unique within the topology.
        topology: what the axes of its features mean.
        parameters: exact count, ``f(dim, **arguments)``.
        flops: ``f(dim, positions, **arguments)``.
        version: raised when the name comes to mean another network.
        min_dim: fewest channels it can serve.
        reach: which positions it mixes, for controllers that choose by what a blueprint is. None: it is not said, but
            where positions are seen one at a time, as in vectors and in sequences without `Mixing`, that is noted.
        arguments: values of keyword arguments under this name, where they differ from the class's defaults.
        normalises: ``f(dim, positions)``, values that its norm takes together; below three, a slot is not served.
        backend: for a class with several implementations: names the one for a (device, dtype); the class takes it as
            keyword argument ``backend: str``. A fallback is chosen here, at build, never while a seed runs.
        on_request: whether a run offers it only where it asks (``slots.blocks``), as it does for whole blocks.

    Raises:
        ConfigError: a bad or taken name, a class without a forward of its own, an argument without type or default, or
            what `check_formulas` finds.
    """

    def register(factory: Module) -> Module:
        where = f"blueprint {name!r} ({topology.value})"
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: a name is lower-case letters, digits and underscores, at most 32")
        if name == COPY:
            raise ConfigError(f"{where}: this name is for copies of the host's own blocks")
        if (topology, name) in _REGISTRY:
            raise ConfigError(f"{where}: this name is taken; taken are {', '.join(names(topology))}")
        if not (isinstance(factory, type) and issubclass(factory, nn.Module)) or issubclass(factory, nn.Sequential):
            raise ConfigError(f"{where}: must be an nn.Module class with a forward of its own, got {factory!r}")
        if factory.forward is nn.Module.forward:
            raise ConfigError(f"{where}: {factory.__name__} has no forward")
        entry = Blueprint(
            name=name,
            topology=topology,
            factory=factory,
            arguments=read_arguments(where, factory, arguments or {}, chosen=("backend",) if backend else ()),
            parameters=parameters,
            flops=flops,
            version=version,
            min_dim=min_dim,
            reach=reach_of(where, factory, topology, reach),
            normalises=normalises,
            backend=backend,
            on_request=on_request,
        )
        check_formulas([entry])
        check_mixing(entry)
        _REGISTRY[topology, name] = entry
        return factory

    return register


def names(topology: Topology) -> tuple[str, ...]:
    """Returns the registered names of one topology, sorted."""
    return tuple(sorted(name for place, name in _REGISTRY if place is topology))


def get(topology: Topology, name: str) -> Blueprint:
    """Returns one entry.

    Raises:
        ConfigError: no such name for this topology; the text lists those that exist.
    """
    entry = _REGISTRY.get((topology, name))
    if entry is None:
        have = ", ".join(names(topology)) or "none"
        raise ConfigError(f"blueprint {name!r}: not registered for {topology.value} features; registered are {have}")
    return entry


def info(topology: Topology, name: str, dim: int, positions: int) -> BlueprintInfo:
    """Returns what one blueprint would add to a slot; raises what `get` and `Blueprint.info` raise."""
    return get(topology, name).info(dim, positions)


def catalogue(
    topology: Topology,
    dim: int,
    positions: int,
    names: Iterable[str] | None = None,
    asked: Iterable[str] = (),
) -> tuple[BlueprintInfo, ...]:
    """Returns what each blueprint that fits a slot would add, sorted by name.

    Args:
        topology: axes of the slot's features.
        dim: channels of the slot's features.
        positions: H*W, T or 1.
        names: only these, each of which must fit. Without it, every registered blueprint that can serve ``dim``.
        asked: of those that are offered on request alone, the ones to offer.

    Raises:
        ConfigError: an unknown name among ``names``.
        ValueError: one of ``names`` cannot serve ``dim``.
    """
    if names is not None:
        return tuple(info(topology, name, dim, positions) for name in sorted(set(names)))
    wanted, asked = (entry for entry in _entries() if entry.topology is topology), set(asked)
    sizes = (e.info_or_none(dim, positions) for e in wanted if not e.on_request or e.name in asked)
    return tuple(size for size in sizes if size is not None)


def _entries() -> list[Blueprint]:
    return [_REGISTRY[key] for key in sorted(_REGISTRY)]


def all_names() -> tuple[str, ...]:
    """Returns the names of every topology, sorted; a name's index here is its catalogue index on the wire."""
    return tuple(sorted({name for _, name in _REGISTRY}))


def index_of(name: str) -> int:
    """Returns the catalogue index of a name.

    Raises:
        ConfigError: not registered for any topology.
    """
    known = all_names()
    if name not in known:
        raise ConfigError(f"blueprint {name!r}: not registered; registered are {', '.join(known)}")
    return known.index(name)


def name_at(index: int) -> str:
    """Returns the name at a catalogue index.

    Raises:
        ConfigError: the index is outside the catalogue.
    """
    known = all_names()
    if not 0 <= index < len(known):
        raise ConfigError(f"blueprint index {index}: the catalogue has 0 to {len(known) - 1}")
    return known[index]


def registry_digest() -> int:
    """Computes a 62-bit digest of every entry: name, topology, version, arguments, both formulas at fixed dims,
    and whether it mixes positions.

    Equal on ranks that would build the same networks from the same names.
    """
    return digest62([_describe(entry) for entry in _entries()])


def describe_registry(device: torch.device, dtype: torch.dtype) -> str:
    """Lists every entry as ``topology/name.version:digest``, with spaces between: shows where two registries differ.

    An entry with several implementations names the chosen one.

    Args:
        device: device that seeds will run on.
        dtype: dtype that seeds will run in.
    """
    return " ".join(
        f"{entry.topology.value}/{entry.name}.v{entry.version}{_backend_suffix(entry, device, dtype)}"
        f":{digest62(_describe(entry)):016x}"
        for entry in _entries()
    )


def _backend_suffix(entry: Blueprint, device: torch.device, dtype: torch.dtype) -> str:
    chosen = entry.backend_for(device, dtype)
    return "" if chosen is None else f"@{chosen}"


def _describe(entry: Blueprint) -> list[Any]:
    sizes = [entry.info_or_none(dim, 49) for dim in CHECKED_DIMS]
    return [entry.topology, entry.name, entry.version, entry.min_dim, dict(entry.arguments), sizes, mixes(entry)]


def check_formulas(entries: Iterable[Blueprint] | None = None, dims: Iterable[int] = CHECKED_DIMS) -> None:
    """Compares parameter formulas with builds on the meta device, which allocate nothing.

    Every blueprint passes it when it registers (milliseconds); call it again to check at other dims.

    Args:
        entries: entries to check; None for all.
        dims: channels to check at; a dim that both formula and constructor refuse by a ValueError passes.

    Raises:
        ConfigError: wrong formulas, builds that fail, or constructors that draw from ``random`` or ``numpy.random``
            (ranks would differ); one text lists them all.
    """
    dims = tuple(dims)
    problems = [line for entry in (_entries() if entries is None else entries) for line in entry.problems(dims)]
    if problems:
        raise ConfigError(problems)


def plugin_modules() -> tuple[str, ...]:
    """Returns the names of the modules outside esper that have registered blueprints, sorted."""
    modules = {entry.factory.__module__ for entry in _entries()}
    return tuple(sorted(name for name in modules if name.partition(".")[0] != "esper"))


def load_plugins() -> tuple[str, ...]:
    """Imports every module named in entry-point group ``esper.blueprints``, which registers its blueprints.

    Returns:
        Names registered since the last call, as ``topology/name``.

    Raises:
        ConfigError: modules that cannot be imported, or whose blueprints are refused; one text lists them all.
    """
    before = set(_REGISTRY)
    problems = []
    for point in _points_of(tuple(_stamped(path) for path in sys.path)):
        try:
            point.load()
        except Exception as error:
            problems.append(f"{ENTRY_POINTS} entry point {point.name} = {point.value}: {error!r}")
    if problems:
        raise ConfigError(problems)
    return tuple(f"{place.value}/{name}" for place, name in sorted(set(_REGISTRY) - before))


def _stamped(path: str) -> tuple[str, int]:
    """A place that packages are imported from, and when it was last changed, ns; 0 if it is not there."""
    try:
        return path, os.stat(path or ".").st_mtime_ns
    except OSError:
        return path, 0


@functools.lru_cache(maxsize=1)
def _points_of(places: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    """Entry points of the group, in order: read off every installed package, so again only once a place has changed."""
    return tuple(sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (point.name, point.value)))
