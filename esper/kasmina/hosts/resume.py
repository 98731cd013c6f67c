"""Hosts that can stop at a slot and go on from there, so that forwards which differ late share what comes before.

    state  = host.forward_to(x, slot)               up to the feature at the slot, before the slot's seed joins it
    output = host.forward_from(state, slot)         that seed joins, then all that follows: host(x), bit for bit
    later  = host.forward_from(state, slot, until=other)        as far as a slot that comes later

A `State` is a tuple of the tensors that the rest of the forward needs, the feature first; nothing writes into them.
Alphas and overrides of seeds are read when a part runs, so one state serves many forwards that differ from its slot on.
`slot_order` is the order of execution, which need not be row-major. Slots are forward hooks: a part that ends at a slot
calls its module's bare ``forward``, and the next part begins with the slot's hook.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor, nn

from esper.kasmina.hosts.registry import InjectionPoint
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import CONTAINER
from esper.kasmina.slots.slot import SeedSlot
from esper.leyline.slots import parse_slot

State: TypeAlias = tuple[Tensor, ...]


@runtime_checkable
class Resumable(Protocol):
    """The methods of a host that can resume; every built-in host has them."""

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        """Returns the places for seeds, row-major."""

    def slot_order(self) -> tuple[str, ...]:
        """Returns all slot ids, in the order in which their modules run."""

    def forward_to(self, x: Tensor, slot: str) -> State:
        """Runs the forward up to a slot, before its seed joins."""

    def forward_from(self, state: State, slot: str, *, until: str | None = None) -> Any:
        """Runs on from a slot, its seed first; returns the output, or with ``until`` the state at a later slot."""


def join_slots(host: nn.Module, module: str, feature: Tensor) -> Tensor:
    """Runs the slots on ``module`` on its output; returns ``feature`` itself if there are none."""
    if hasattr(host, CONTAINER):
        for holder in host.get_submodule(CONTAINER).children():
            assert isinstance(holder, SeedSlot)
            if holder.site is not None and holder.site.module == module:
                after = holder.hook(host.get_submodule(module), (feature,), {}, feature)
                feature = feature if after is None else after
    return feature


def order_indices(order: Sequence[str], slot: str, until: str | None) -> tuple[int, int | None]:
    """Returns the indices of two slots in the order of execution.

    Raises:
        ConfigError: one of them is not a slot of this host.
        ValueError: ``until`` does not come after ``slot``.
    """
    parse_slot(slot, order)
    if until is None:
        return order.index(slot), None
    parse_slot(until, order)
    if order.index(until) <= order.index(slot):
        raise ValueError(f"until = {until!r} does not run after {slot}; slots run in the order {', '.join(order)}")
    return order.index(slot), order.index(until)


def resumable(grown: Grown) -> Resumable | None:
    """Returns the host if it can resume exactly from every slot of ``grown``; None if only full forwards are exact.

    It cannot if slots are elsewhere than its `injection_points` or its `slot_order` say, or if other hooks watch or
    change what a module takes and returns: a part would skip them.
    """
    host = grown.model
    if not isinstance(host, Resumable):
        return None
    points = {point.slot: point.module for point in host.injection_points()}
    if any(points.get(slot) != site.module for slot, site in grown.sites.items()):
        return None
    if not set(grown.sites) <= set(host.slot_order()):
        return None
    sites = {site.module for site in grown.sites.values()}
    for name, module in host.named_modules():
        slot_hooks = int(name in sites)  # the root, with its own hooks that mark a forward, is left out
        if name and (len(module._forward_hooks) != slot_hooks or module._forward_pre_hooks):
            return None
    return host


class Chain(nn.Module, ABC):
    """A host made of a stem, a chain of links, and a tail; the output of a link may be the feature of a slot.

    A subclass defines ``_stem``, ``_tail``, ``_links`` and ``injection_points``; its forward runs them in that order.
    """

    @abstractmethod
    def _links(self) -> tuple[str, ...]:
        """Returns the names of the submodules that are the links, in the order of execution."""

    @abstractmethod
    def _stem(self, x: Tensor) -> Tensor:
        """Returns what the first link takes."""

    @abstractmethod
    def _tail(self, x: Tensor) -> Tensor:
        """Returns the output, from that of the last link."""

    @abstractmethod
    def injection_points(self) -> tuple[InjectionPoint, ...]:
        """Returns the places for seeds, row-major."""

    def slot_order(self) -> tuple[str, ...]:
        """Returns slot ids in the order of execution, of those that are on a link."""
        slots = {point.module: point.slot for point in self.injection_points()}
        return tuple(slots[link] for link in self._links() if link in slots)

    def _places(self) -> dict[str, int]:
        """Returns the index of the link that each slot is on."""
        places = {link: index for index, link in enumerate(self._links())}
        return {point.slot: places[point.module] for point in self.injection_points() if point.module in places}

    def forward_to(self, x: Tensor, slot: str) -> State:
        """See `Resumable`.

        Raises:
            ConfigError: no such slot.
        """
        order_indices(self.slot_order(), slot, None)
        links, last = self._links(), self._places()[slot]
        x = self._stem(x)
        for link in links[:last]:
            x = self.get_submodule(link)(x)
        return (self.get_submodule(links[last]).forward(x),)

    def forward_from(self, state: State, slot: str, *, until: str | None = None) -> Any:
        """See `Resumable`.

        Raises:
            ConfigError: no such slot.
            ValueError: ``until`` does not come after ``slot``.
        """
        order_indices(self.slot_order(), slot, until)
        links, places = self._links(), self._places()
        first, last = places[slot], None if until is None else places[until]
        (x,) = state
        x = join_slots(self, links[first], x)
        for link in links[first + 1 : last]:
            x = self.get_submodule(link)(x)
        return self._tail(x) if last is None else (self.get_submodule(links[last]).forward(x),)
