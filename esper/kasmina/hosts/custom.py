"""A host of your own: any function that returns an ``nn.Module``, and the names of the modules that get a slot.

    kind: custom
    path: my_lab.models:build_resnet       # build_resnet(input_shape=(3, 32, 32), classes=10, depth=20) -> nn.Module
    options: {depth: 20}
    sites: {r0c0: layer2, r1c0: layer3}    # slot id -> dotted module name, as in model.named_modules()

Topology and width at each site are read off a forward when the slots are attached.
"""

import functools
import inspect
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from esper.kasmina.hosts.registry import InjectionPoint, host
from esper.leyline.checks import Checks
from esper.leyline.errors import ConfigError
from esper.leyline.imports import import_object, is_dotted
from esper.leyline.slots import sort_slots


@dataclass(kw_only=True, slots=True)
class CustomHostConfig:
    """Where the function is, its keyword arguments, and where slots go.

    Fields:
        kind: ``custom``.
        path: ``package.module:function``, importable on every rank; called with ``input_shape`` and ``classes``.
        options: its further keyword arguments.
        sites: slot id -> dotted name of the submodule whose output is the feature there.
    """

    kind: str = "custom"
    path: str
    options: dict[str, Any] = field(default_factory=dict)
    sites: dict[str, str]

    def __post_init__(self) -> None:
        sort_slots(self.sites)
        with Checks(self) as check:
            check("kind", self.kind == "custom", "must be 'custom'")
            check("path", is_dotted(self.path), "write package.module:function")
            check("sites", bool(self.sites), "name at least one, as {r0c0: module.name}")
            reserved = {"input_shape", "classes"} & set(self.options)
            check("options", not reserved, "input_shape and classes are given by the data; leave them out")


def _points(sites: dict[str, str]) -> tuple[InjectionPoint, ...]:
    return tuple(InjectionPoint(slot=slot, module=sites[slot], topology=None) for slot in sort_slots(sites))


@host("custom", config=CustomHostConfig)
def build_custom(config: CustomHostConfig, *, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Builds the model at ``config.path`` and notes where its slots go.

    Raises:
        ConfigError: it cannot be imported, does not take the call, returns no module, or lacks a named site.
    """
    build = import_object(config.path, "host.path")
    try:
        inspect.signature(build).bind(input_shape=input_shape, classes=classes, **config.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"host.options = {config.options!r}: {config.path} does not take input_shape, classes and these; {error}"
        ) from None
    network = build(input_shape=input_shape, classes=classes, **config.options)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"host.path = {config.path!r}: returned {type(network).__name__}, need an nn.Module")
    known = dict(network.named_modules())
    for slot, name in config.sites.items():
        if name not in known:
            some = ", ".join(list(known)[1:9])
            raise ConfigError(f"host.sites.{slot} = {name!r}: the model has no such module; it has {some}, ...")
    # A partial rather than a closure, so that the model can still be pickled and copied.
    network.injection_points = functools.partial(_points, dict(config.sites))  # type: ignore[assignment]
    return network
