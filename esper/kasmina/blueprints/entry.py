"""One blueprint: a module class, the arguments that build it, and formulas that must agree with the built module."""

import inspect
import random
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import nn

from esper.leyline.errors import ConfigError
from esper.leyline.observation import BlueprintInfo
from esper.leyline.topology import Reach, Topology

LEAST = 3  # values of a norm from which on its output depends on more than their order
_ARGUMENT_TYPES = (bool, int, float, str)


@dataclass(frozen=True, slots=True)
class Backend:
    """An implementation of a blueprint.

    Fields:
        name: name of the implementation.
        why: if it is a fallback, the reason in one line; else empty.
    """

    name: str
    why: str = ""


Chooser = Callable[[torch.device, torch.dtype], Backend]


def _streams_outside_torch() -> tuple[Any, ...]:
    """Reads the state of the random streams that a birth cannot make private."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return random.getstate(), kind, np.asarray(keys).tobytes(), rest


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """An entry of the registry: a module class with the arguments that build it under this name.

    Fields:
        name: name of the blueprint.
        topology: axes of its features; unique together with the name.
        factory: the module class.
        arguments: every keyword argument of the class, with its value under this name.
        parameters: formula for the parameter count; see `esper.kasmina.blueprints.registry`.
        flops: formula for the FLOPs of one forward over one sample; see there.
        version: raised when the name comes to mean another network.
        min_dim: fewest channels it can serve.
        reach: which positions it mixes; None if it does not say.
        normalises: formula for the number of values that its norm takes together: of two it leaves the order alone, of
            one nothing, so a slot with fewer than three is not served. None: as ``min_dim`` says.
        backend: chooses the implementation for a device and dtype, None where there is only one.
        on_request: whether it is offered only where a run asks for it.
    """

    name: str
    topology: Topology
    factory: type[nn.Module]
    arguments: Mapping[str, Any]
    parameters: Callable[..., int]
    flops: Callable[..., int]
    version: int
    min_dim: int
    reach: Reach | None
    normalises: Callable[[int, int], int] | None = None
    backend: Chooser | None = None
    on_request: bool = False

    def _error(self, dim: int, why: object) -> ValueError:
        return ValueError(f"blueprint {self.name} ({self.topology.value}) cannot serve dim = {dim}: {why}")

    def _check_dim(self, dim: int) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < self.min_dim:
            raise self._error(dim, f"needs an integer >= {self.min_dim}")

    def backend_for(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Returns the name of the implementation for a device and dtype; None where there is only one."""
        return None if self.backend is None else self.backend(device, dtype).name

    def build(self, dim: int, backend: str | None = None) -> nn.Module:
        """Builds the module for ``dim`` channels with torch's present defaults; seeds use `esper.kasmina.births.build`.

        Args:
            dim: channels.
            backend: from `backend_for`; None is the class's default.

        Raises:
            ValueError: the blueprint cannot serve ``dim``.
        """
        self._check_dim(dim)
        chosen = {} if backend is None else {"backend": backend}
        try:
            return self.factory(dim, **self.arguments, **chosen)
        except ValueError as error:
            raise self._error(dim, error) from error

    def info(self, dim: int, positions: int) -> BlueprintInfo:
        """Returns what it would add to a slot with ``dim`` channels at ``positions`` positions (H*W, T or 1).

        Raises:
            ValueError: the blueprint cannot serve ``dim``.
        """
        self._check_dim(dim)
        values = LEAST if self.normalises is None else self.normalises(dim, positions)
        if values < LEAST:
            raise self._error(dim, f"its norm has {values} values at {positions} positions and leaves nothing of them")
        try:
            parameters = self.parameters(dim, **self.arguments)
            flops = self.flops(dim, positions, **self.arguments)
        except ValueError as error:
            raise self._error(dim, error) from error
        return BlueprintInfo(name=self.name, parameters=parameters, flops=flops, reach=self.reach)

    def info_or_none(self, dim: int, positions: int) -> BlueprintInfo | None:
        """Like `info`, but returns None if the blueprint cannot serve ``dim``."""
        try:
            return self.info(dim, positions)
        except ValueError:
            return None

    def problems(self, dims: Iterable[int]) -> list[str]:
        """Lists the problems that `check_formulas` of the registry reports for this entry, one line each."""
        before = _streams_outside_torch()
        texts = [self._problem_at(dim) for dim in dims]
        if _streams_outside_torch() != before:
            texts.append("its constructor draws from random or numpy.random; use torch's random functions")
        return [f"blueprint {self.name!r} ({self.topology.value}): {text}" for text in texts if text is not None]

    def _problem_at(self, dim: int) -> str | None:
        claimed = None
        try:
            claimed = self.info_or_none(dim, 4)
            with torch.device("meta"):
                built = self.build(dim)
            counted = sum(tensor.numel() for tensor in built.parameters())
        except Exception as error:
            if claimed is None and isinstance(error, ValueError):
                return None  # formulas and constructor refuse this dim alike
            return f"fails at dim = {dim}: {error!r}"
        if claimed is None:
            return f"can be built at dim = {dim}, but its formulas refuse it"
        if claimed.parameters != counted:
            return f"has {counted} parameters at dim = {dim}, its formula says {claimed.parameters}"
        drifting = [name for name, buffer in built.named_buffers() if buffer.is_floating_point()]
        if drifting:  # each rank would update them from its own samples; those of seeds are not averaged
            return f"has running statistics ({', '.join(drifting[:3])}); use GroupNorm or LayerNorm, not BatchNorm"
        return None


def read_arguments(
    where: str, factory: type[nn.Module], given: Mapping[str, Any], *, chosen: tuple[str, ...] = ()
) -> Mapping[str, Any]:
    """Returns the keyword arguments of ``factory`` with their values: its defaults, overridden by ``given``.

    Args:
        where: what an error calls the blueprint.
        factory: the module class.
        given: values that differ from the defaults.
        chosen: arguments that are decided at build, and so do not belong to the blueprint's meaning.

    Raises:
        ConfigError: an argument without type or default, a value of another type, or an unknown argument.
    """
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
    problems += [f"{where}: no argument {name}, which its backend is given as" for name in chosen if name not in values]
    values = {name: value for name, value in values.items() if name not in chosen}
    unknown = sorted(set(given) - set(values))
    if unknown:
        problems.append(f"{where}: no argument {', '.join(unknown)}; it takes {', '.join(values) or 'none but dim'}")
    if problems:
        raise ConfigError(problems)
    return MappingProxyType(values)
