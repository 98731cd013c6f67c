"""A seed that is a whole block of the host: a copy of the module at its site, called as that module was called.

A block returns features, h -> block(h), where other seeds return a delta. Its call has h in the place of the feature
that the site's module took, and every other argument as it was in that call: masks, position embeddings, flags. The
slot (`esper.kasmina.slots.joint`) joins the two as h + a (block(h) - h).
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from esper.kasmina.axes.feature import take
from esper.kasmina.axes.site import Site
from esper.leyline.errors import ConfigError


class Call(NamedTuple):
    """The arguments of one call of a site's module."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}

    @property
    def cache(self) -> Any:
        """The cache of keys and values among the arguments; None without one."""
        values = (*self.args, *self.kwargs.values())
        return next((v for v in values if hasattr(v, "update") and hasattr(v, "get_seq_length")), None)

    def find_feature(self, like: Tensor) -> int | str | None:
        """Where the module takes its feature: the first argument of the output's shape; None where there is none."""
        places: list[tuple[int | str, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        for place, value in places:
            if isinstance(value, Tensor) and value.is_floating_point() and value.shape == like.shape:
                return place
        return None

    def with_feature(self, place: int | str, feature: Tensor) -> "Call":
        """The same call on another feature."""
        if isinstance(place, int):
            return Call((*self.args[:place], feature, *self.args[place + 1 :]), self.kwargs)
        return Call(self.args, {**self.kwargs, place: feature})

    def has_further(self, like: Tensor) -> bool:
        """Whether there is an argument beside the feature that says something."""
        place = self.find_feature(like)
        others = [v for i, v in enumerate(self.args) if i != place] + [v for k, v in self.kwargs.items() if k != place]
        return any(value is not None and value is not False for value in others)


class OwnBlock(nn.Module):
    """The seed of the blueprint ``copy``.

    Args:
        block: a copy of the site's module, without hooks and slots.
        site: its place in the host.
    """

    def __init__(self, block: nn.Module, site: Site) -> None:
        super().__init__()
        self.block, self.site = block, site

    def forward(self, h: Tensor, call: Call | None = None) -> Tensor:
        """Returns block(h).

        Args:
            h: features, their axes in the order of the topology.
            call: arguments of the site's module in this forward; None where it takes the feature alone.

        Raises:
            ConfigError: no argument of the call has the feature's shape.
        """
        feature = self.site.turned_back(h)
        call = Call((feature,)) if call is None else call
        place = call.find_feature(feature)
        if place is None:
            raise ConfigError(
                f"site {self.site.module!r} of slot {self.site.slot}: its copy found no argument of shape "
                f"{tuple(feature.shape)} in the module's call; a copy needs a block that keeps the shape of its input"
            )
        again = call.with_feature(place, feature)
        return self.site.turned(take(self.block(*again.args, **again.kwargs), self.site.place))
