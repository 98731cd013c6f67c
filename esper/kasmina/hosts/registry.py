"""Built-in hosts: the networks that growth begins from, by kind.

A host is a plain ``nn.Module`` with ``injection_points()``. To add one: write its config dataclass (with a field
``kind: str`` whose default is the registered kind) and its row in `esper.kasmina.hosts.configs`, which needs no torch,
a builder in a module of its own, and
``conf/host/<kind>.yaml`` (``defaults: [/ItsConfig@_here_, _self_]`` and ``kind: <kind>``).
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from esper.leyline.errors import ConfigError
from esper.leyline.slots import sort_slots
from esper.leyline.topology import Topology

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectionPoint:
    """A place in a host where a seed may live.

    Fields:
        slot: canonical slot id.
        module: dotted name of the submodule whose output is the feature there; it runs exactly once a forward.
        topology: what the axes of that feature mean; None if only a forward can tell.
        layout: the order in which they stand; None: that of the topology.
        may_skip: a forward in train() may leave the module out.
    """

    slot: str
    module: str
    topology: Topology | None
    layout: str | None = None
    may_skip: bool = False

    @property
    def known_layout(self) -> str | None:
        """The order of the axes; None if only a forward can tell."""
        return self.layout or (None if self.topology is None else self.topology.value)


class Host(Protocol):
    """The methods of a built-in host, beside those of an nn.Module."""

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        """Returns the places for seeds, row-major."""


class Build(Protocol):
    """Builds a host from its config; initial weights come from torch's global generator, seeded by the caller."""

    def __call__(self, config: Any, *, input_shape: tuple[int, ...], classes: int) -> "nn.Module":
        """Builds the host.

        Args:
            config: an instance of the kind's config class.
            input_shape: shape of one sample, without the batch axis.
            classes: width of the logits.
        """


@dataclass(frozen=True, slots=True)
class HostKind:
    """An entry of the registry: the config class and the builder."""

    config: type
    build: Build


HOSTS: dict[str, HostKind] = {}

Builder = TypeVar("Builder", bound="Callable[..., nn.Module]")


def host(kind: str, *, config: type) -> Callable[[Builder], Builder]:
    """Decorator that registers a builder with its config class.

    Raises:
        ConfigError: the kind is taken, or is not the config's default ``kind``.
    """

    def register(build: Builder) -> Builder:
        if kind in HOSTS:
            raise ConfigError(f"host.kind = {kind!r}: this kind is taken; taken are {', '.join(sorted(HOSTS))}")
        default = next((field.default for field in dataclasses.fields(config) if field.name == "kind"), None)
        if default != kind:
            raise ConfigError(f"host.kind = {kind!r}: {config.__name__}.kind has the default {default!r}")
        HOSTS[kind] = HostKind(config, build)
        return build

    return register


def _kind(kind: str) -> HostKind:
    if kind not in HOSTS:
        raise ConfigError(f"host.kind = {kind!r}: no such host; there are {', '.join(sorted(HOSTS))}")
    return HOSTS[kind]


def host_config_class(kind: str) -> type:
    """Returns the config class of a kind.

    Raises:
        ConfigError: unknown kind; the text lists the kinds.
    """
    return _kind(kind).config


def build_host(config: Any, input_shape: tuple[int, ...], classes: int) -> "nn.Module":
    """Builds a host; initial weights come from torch's global generator, which the caller seeds.

    Args:
        config: an instance of the kind's config class.
        input_shape: shape of one sample, without the batch axis.
        classes: width of the logits.

    Raises:
        ConfigError: unknown kind, a config of another class, or sizes that do not fit each other.
    """
    entry = _kind(config.kind)
    if not isinstance(config, entry.config):
        raise ConfigError(f"host: kind {config.kind!r} takes {entry.config.__name__}, got {type(config).__name__}")
    if classes < 1:
        raise ConfigError(f"host: {classes} classes, needs at least 1")
    network = entry.build(config, input_shape=tuple(input_shape), classes=classes)
    points: tuple[InjectionPoint, ...] = network.injection_points()  # type: ignore[operator]
    sort_slots(point.slot for point in points)
    for point in points:
        network.get_submodule(point.module)
    return network
