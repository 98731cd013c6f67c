"""The catalogue of blueprints: what a seed may be, by topology and name.

A blueprint is an ``nn.Module`` class taking ``dim`` and typed keyword arguments with defaults; ``forward(x)`` returns a
*delta* of x's shape and memory format (the slot computes ``h + alpha * delta(x)``). To add one:

1. Write the class, beginning with a norm where scale matters and ending in `parts.LayerScale`. No BatchNorm, no fixed
   resolution, no zero init, no random numbers but torch's; a SEQUENCE blueprint must not look ahead.
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

import inspect
import random
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from esper.leyline.errors import ConfigError
from esper.leyline.observation import BlueprintInfo
from esper.leyline.plain import digest62
from esper.leyline.topology import Topology

ENTRY_POINTS = "esper.blueprints"
CHECKED_DIMS = (1, 2, 3, 8, 12, 64)

_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_ARGUMENT_TYPES = (bool, int, float, str)
_REGISTRY: dict[tuple[Topology, str], "Blueprint"] = {}

Module = TypeVar("Module", bound=type[nn.Module])


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """One entry: a module class with the arguments it is built with under this name.

    Fields:
        name, topology: the key of the entry.
        factory: the module class.
        arguments: every keyword argument of the class, with its value under this name.
        parameters, flops: formulas; see the module's docstring.
        version: raised when the name comes to mean another network.
        min_dim: fewest channels it can serve.
    """

    name: str
    topology: Topology
    factory: type[nn.Module]
    arguments: Mapping[str, Any]
    parameters: Callable[..., int]
    flops: Callable[..., int]
    version: int
    min_dim: int

    def _error(self, dim: int, why: object) -> ValueError:
        return ValueError(f"blueprint {self.name} ({self.topology.value}) cannot serve dim = {dim}: {why}")

    def _check_dim(self, dim: int) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < self.min_dim:
            raise self._error(dim, f"needs an integer >= {self.min_dim}")

    def build(self, dim: int) -> nn.Module:
        """The module for ``dim`` channels, on torch's present defaults; see `esper.kasmina.birth` for a seed.

        Raises:
            ValueError: the blueprint cannot serve ``dim``.
        """
        self._check_dim(dim)
        try:
            return self.factory(dim, **self.arguments)
        except ValueError as error:
            raise self._error(dim, error) from error

    def info(self, dim: int, positions: int) -> BlueprintInfo:
        """What it would add to a slot with ``dim`` channels at ``positions`` places (H*W, T or 1).

        Raises:
            ValueError: the blueprint cannot serve ``dim``.
        """
        self._check_dim(dim)
        try:
            parameters = self.parameters(dim, **self.arguments)
            flops = self.flops(dim, positions, **self.arguments)
        except ValueError as error:
            raise self._error(dim, error) from error
        return BlueprintInfo(name=self.name, parameters=parameters, flops=flops)


def _read_arguments(where: str, factory: type[nn.Module], given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Keyword arguments of ``factory`` with the values in force: its defaults, overridden by ``given``."""
    parameters = list(inspect.signature(factory).parameters.values())
    if not parameters or parameters[0].name != "dim":
        raise ConfigError(f"{where}: the first argument of {factory.__name__} must be dim")
    hints = typing.get_type_hints(factory.__init__)
    problems, values = [], {}
    for parameter in parameters[1:]:
        name, kind = parameter.name, hints.get(parameter.name)
        value = given.get(name, parameter.default)
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            problems.append(f"{where}: {parameter} hides the argument names; list them")
        elif kind not in _ARGUMENT_TYPES:
            problems.append(f"{where}: argument {name} needs a type, one of bool, int, float, str")
        elif parameter.default is parameter.empty:
            problems.append(f"{where}: argument {name} needs a default")
        elif type(value) is not kind:
            problems.append(f"{where}: argument {name} is {value!r}, its type is {kind.__name__}")
        values[name] = value
    unknown = sorted(set(given) - set(values))
    if unknown:
        problems.append(f"{where}: no argument {', '.join(unknown)}; it takes {', '.join(values) or 'none but dim'}")
    if problems:
        raise ConfigError(problems)
    return MappingProxyType(values)


def blueprint(
    name: str,
    *,
    topology: Topology,
    parameters: Callable[..., int],
    flops: Callable[..., int],
    version: int = 1,
    min_dim: int = 1,
    arguments: Mapping[str, Any] | None = None,
) -> Callable[[Module], Module]:
    """Class decorator that registers a blueprint; see the module's docstring for the checklist.

    Args:
        name: lower case, digits and underscores; unique within the topology.
        topology: what the axes of its features mean.
        parameters: exact count, ``f(dim, **arguments)``.
        flops: ``f(dim, positions, **arguments)``.
        version: raised when the name comes to mean another network.
        min_dim: fewest channels it can serve.
        arguments: values of keyword arguments under this name, where they differ from the class's defaults.

    Raises:
        ConfigError: a bad or taken name, a class without a forward of its own, an argument without type or default, or
            what `check_formulas` finds.
    """

    def register(factory: Module) -> Module:
        where = f"blueprint {name!r} ({topology.value})"
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{where}: a name is lower-case letters, digits and underscores, at most 32")
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
            arguments=_read_arguments(where, factory, arguments or {}),
            parameters=parameters,
            flops=flops,
            version=version,
            min_dim=min_dim,
        )
        check_formulas([entry])
        _REGISTRY[topology, name] = entry
        return factory

    return register


def names(topology: Topology) -> tuple[str, ...]:
    """Registered names of one topology, sorted."""
    return tuple(sorted(name for place, name in _REGISTRY if place is topology))


def get(topology: Topology, name: str) -> Blueprint:
    """One entry.

    Raises:
        ConfigError: no such name for this topology; the text lists those that exist.
    """
    entry = _REGISTRY.get((topology, name))
    if entry is None:
        have = ", ".join(names(topology)) or "none"
        raise ConfigError(f"blueprint {name!r}: not registered for {topology.value} features; registered are {have}")
    return entry


def info(topology: Topology, name: str, dim: int, positions: int) -> BlueprintInfo:
    """What one blueprint would add; errors as `get` and `Blueprint.info`."""
    return get(topology, name).info(dim, positions)


def catalogue(
    topology: Topology, dim: int, positions: int, names: Iterable[str] | None = None
) -> tuple[BlueprintInfo, ...]:
    """What fits a slot, sorted by name.

    Args:
        topology, dim, positions: the slot's features; ``positions`` is H*W, T or 1.
        names: only these, each of which must fit. Without it, every registered blueprint that can serve ``dim``.

    Raises:
        ConfigError: an unknown name among ``names``.
        ValueError: one of ``names`` cannot serve ``dim``.
    """
    if names is not None:
        return tuple(info(topology, name, dim, positions) for name in sorted(set(names)))
    sizes = (_size(entry, dim, positions) for entry in _entries() if entry.topology is topology)
    return tuple(size for size in sizes if size is not None)


def _entries() -> list[Blueprint]:
    return [_REGISTRY[key] for key in sorted(_REGISTRY)]


def _size(entry: Blueprint, dim: int, positions: int) -> BlueprintInfo | None:
    """What it would add, None if it cannot serve ``dim``."""
    try:
        return entry.info(dim, positions)
    except ValueError:
        return None


def all_names() -> tuple[str, ...]:
    """Names of every topology, sorted: a name's place here is its catalogue index on the wire."""
    return tuple(sorted({name for _, name in _REGISTRY}))


def index_of(name: str) -> int:
    """Catalogue index of a name.

    Raises:
        ConfigError: not registered for any topology.
    """
    known = all_names()
    if name not in known:
        raise ConfigError(f"blueprint {name!r}: not registered; registered are {', '.join(known)}")
    return known.index(name)


def name_at(index: int) -> str:
    """The name at a catalogue index.

    Raises:
        ConfigError: the index is outside the catalogue.
    """
    known = all_names()
    if not 0 <= index < len(known):
        raise ConfigError(f"blueprint index {index}: the catalogue has 0 to {len(known) - 1}")
    return known[index]


def registry_digest() -> int:
    """62-bit digest of every entry: name, topology, version, arguments and both formulas at fixed dims.

    Equal on ranks that would build the same networks from the same names.
    """
    rows = []
    for entry in _entries():
        sizes = [_size(entry, dim, 49) for dim in CHECKED_DIMS]
        rows.append([entry.topology, entry.name, entry.version, entry.min_dim, dict(entry.arguments), sizes])
    return digest62(rows)


def _outside_torch() -> tuple[Any, ...]:
    """State of the random streams that a birth cannot make private."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), kind, np.asarray(keys).tobytes(), rest


def _formula_problem(entry: Blueprint, dim: int) -> str | None:
    """What is wrong with an entry at ``dim``, None if nothing."""
    claimed = _size(entry, dim, 4)
    try:
        with torch.device("meta"):
            counted = sum(tensor.numel() for tensor in entry.build(dim).parameters())
    except Exception as error:
        if claimed is None and isinstance(error, ValueError):
            return None  # formula and constructor refuse this dim alike
        return f"cannot be built at dim = {dim}: {error!r}"
    if claimed is None:
        return f"can be built at dim = {dim}, but its formulas refuse it"
    if claimed.parameters != counted:
        return f"has {counted} parameters at dim = {dim}, its formula says {claimed.parameters}"
    return None


def check_formulas(entries: Iterable[Blueprint] | None = None, dims: Iterable[int] = CHECKED_DIMS) -> None:
    """Compares parameter formulas with builds on the meta device, which allocate nothing.

    Every blueprint passes it when it registers (milliseconds); call it again to check at other dims.

    Args:
        entries: which; None is all.
        dims: channels to check at; where formula and constructor both refuse one by a ValueError, all is well.

    Raises:
        ConfigError: formulas that are wrong, builds that fail, constructors that draw from ``random`` or
            ``numpy.random`` (ranks would differ), all of them in one text.
    """
    problems = []
    dims = tuple(dims)
    for entry in _entries() if entries is None else entries:
        before = _outside_torch()
        found = [_formula_problem(entry, dim) for dim in dims]
        if _outside_torch() != before:
            found.append("its constructor draws from random or numpy.random; use torch's random functions")
        problems += [f"blueprint {entry.name!r} ({entry.topology.value}): {text}" for text in found if text is not None]
    if problems:
        raise ConfigError(problems)


def load_plugins() -> tuple[str, ...]:
    """Imports every module named in entry-point group ``esper.blueprints``, which registers its blueprints.

    Returns:
        Names that are new since the last call, as ``topology/name``.

    Raises:
        ConfigError: modules that cannot be imported, or whose blueprints are refused, all of them in one text.
    """
    before = set(_REGISTRY)
    problems = []
    for point in sorted(entry_points(group=ENTRY_POINTS), key=lambda point: (point.name, point.value)):
        try:
            point.load()
        except Exception as error:
            problems.append(f"{ENTRY_POINTS} entry point {point.name} = {point.value}: {error!r}")
    if problems:
        raise ConfigError(problems)
    return tuple(f"{place.value}/{name}" for place, name in sorted(set(_REGISTRY) - before))
