"""A host of your own: any function that returns an ``nn.Module``, and the names of the modules that get a slot.

    kind: custom
    path: my_lab.models:build_resnet       # build_resnet(input_shape=(3, 32, 32), classes=10, depth=20) -> nn.Module
    options: {depth: 20}
    sites: {r0c0: layer2, r1c0: layer3}    # slot id -> dotted module name, as in model.named_modules()

What the axes at each site mean is found by a few forwards when the slots are attached; ``layout`` says what they
leave open.
"""

import functools
import inspect
from typing import Any

from torch import nn

from esper.kasmina.hosts.configs import CustomHostConfig
from esper.kasmina.hosts.registry import InjectionPoint
from esper.kasmina.slots.sites import list_some
from esper.leyline.errors import ConfigError
from esper.leyline.imports import import_object
from esper.leyline.slots import sort_slots
from esper.leyline.topology import topology_of


def _points(sites: dict[str, str], layout: dict[str, str], may_skip: list[str]) -> tuple[InjectionPoint, ...]:
    return tuple(
        InjectionPoint(
            slot=slot,
            module=sites[slot],
            topology=topology_of(layout[slot]) if slot in layout else None,
            layout=layout.get(slot),
            may_skip=slot in may_skip,
        )
        for slot in sort_slots(sites)
    )


def call_builder(
    path: str, options: dict[str, Any], input_shape: tuple[int, ...], classes: int, *, section: str
) -> nn.Module:
    """Calls a user's own function, and returns the model that it builds.

    Args:
        path: ``package.module:function``.
        options: its keyword arguments beside input_shape and classes.
        input_shape: shape of one sample of the data, without the batch axis.
        classes: classes of the data.
        section: section of the config that holds path and options, for an error.

    Raises:
        ConfigError: the function cannot be imported, does not take these arguments, or returns no module.
    """
    build = import_object(path, f"{section}.path")
    try:
        inspect.signature(build).bind(input_shape=input_shape, classes=classes, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{section}.options = {options!r}: {path} does not take input_shape, classes and these; {error}"
        ) from None
    network = build(input_shape=input_shape, classes=classes, **options)
    if not isinstance(network, nn.Module):
        raise ConfigError(f"{section}.path = {path!r}: returned {type(network).__name__}, need an nn.Module")
    return network


def build_custom(config: CustomHostConfig, *, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Builds the model at ``config.path`` and notes where its slots go.

    Raises:
        ConfigError: the model cannot be built (see `call_builder`), or lacks a named site.
    """
    network = call_builder(config.path, config.options or {}, input_shape, classes, section="host")
    known = dict(network.named_modules())
    for slot, name in config.sites.items():
        if name not in known:
            listed = list_some(list(known)[1:])
            raise ConfigError(f"host.sites.{slot} = {name!r}: the model has no such module; it has {listed}")
    # A partial rather than a closure: the model can still be pickled and copied.
    told = dict(config.sites), dict(config.layout or {}), list(config.may_skip or ())
    network.injection_points = functools.partial(_points, *told)  # type: ignore[assignment]
    return network
