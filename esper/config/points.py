"""The slots of a host that its settings alone tell, before anything is trained.

The host is built on the meta device: no memory, and hardly any time.
"""

from typing import Any

import torch

from esper.config.samples import sample_of
from esper.kasmina.hosts import CustomHostConfig, InjectionPoint, build_host
from esper.leyline.errors import ConfigError
from esper.leyline.slots import sort_slots


class _Built:
    """The injection points of the host that was built last: several rules ask for those of one config.

    Fields:
        host: its config. said: what that and the samples' shape looked like, since a config may be changed in place.
    """

    host: Any = None
    said = ""
    points: tuple[InjectionPoint, ...] = ()


def points_of(host: Any, data: Any) -> tuple[InjectionPoint, ...] | None:
    """The host's injection points; None if the data's shape is not known.

    A custom host is not built here: its code may do things that the meta device cannot.

    Raises:
        ConfigError: the host does not take the data.
    """
    if isinstance(host, CustomHostConfig):
        return tuple(InjectionPoint(slot=slot, module=name, topology=None) for slot, name in host.sites.items())
    sample = sample_of(data)
    if sample is None:
        return None
    said = f"{host!r} {sample}"
    if host is _Built.host and said == _Built.said:
        return _Built.points
    with torch.device("meta"):
        network: Any = build_host(host, *sample)
    points: tuple[InjectionPoint, ...] = network.injection_points()
    _Built.host, _Built.said, _Built.points = host, said, points
    return points


def host_slots(host: Any, data: Any) -> tuple[str, ...]:
    """Slot ids of a host on this data, row-major; empty if they cannot be known."""
    try:
        points = points_of(host, data)
    except ConfigError:  # `host_takes_data` reports it
        return ()
    return sort_slots(point.slot for point in points or ())
