"""Hosts that can stop at a slot and go on from there, so that forwards which differ late share what comes before.

    state  = host.forward_to(x, slot)               up to the feature at the slot, before the slot's seed joins it
    output = host.forward_from(state, slot)         that seed joins, then all that follows: host(x), bit for bit
    later  = host.forward_from(state, slot, until=other)        as far as a slot that comes later

A `State` is what the rest of the forward needs: a tuple of tensors, the feature first; nothing writes into them. What
seeds do (alphas, overrides) is read when a part runs, so one state serves many forwards that differ from its slot on.
`slot_order` is the order of execution, which need not be row-major. Slots stand on forward hooks; a part that ends at a
slot calls its module's bare ``forward``, and the next part begins with the slot's hook.
"""

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
    """What a host has that can resume; every built-in one does."""

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        """Places for seeds, row-major."""

    def slot_order(self) -> tuple[str, ...]:
        """All slot ids, in the order in which their modules run."""

    def forward_to(self, x: Tensor, slot: str) -> State:
        """The forward up to a slot; its seed has not joined."""

    def forward_from(self, state: State, slot: str, *, until: str | None = None) -> Any:
        """The rest of the forward, the slot's seed first: the output, or with ``until`` the state at a later slot."""


def join_slots(host: nn.Module, module: str, feature: Tensor) -> Tensor:
    """What the slots on ``module`` make of its output; ``feature`` itself where there are none."""
    if hasattr(host, CONTAINER):
        for holder in host.get_submodule(CONTAINER).children():
            assert isinstance(holder, SeedSlot)
            if holder.site is not None and holder.site.module == module:
                after = holder.hook(host.get_submodule(module), (), feature)
                feature = feature if after is None else after
    return feature


def places(order: Sequence[str], slot: str, until: str | None) -> tuple[int, int | None]:
    """Where two slots are in the order of execution.

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
    """The host, where it can resume from every slot of ``grown`` with nothing lost; None: only full forwards will do.

    It cannot where slots stand elsewhere than its `injection_points` say, or where somebody else's hooks watch or
    change what a module takes and returns: a part would pass over them.
    """
    host = grown.model
    if not isinstance(host, Resumable):
        return None
    points = {point.slot: point.module for point in host.injection_points()}
    if any(points.get(slot) != site.module for slot, site in grown.sites.items()):
        return None
    sites = {site.module for site in grown.sites.values()}
    for name, module in host.named_modules():
        own = int(name in sites) if name else len(module._forward_hooks)  # the root's mark where a forward begins
        if name and (len(module._forward_hooks) != own or module._forward_pre_hooks):
            return None
    return host


class Chain(nn.Module):
    """A host that is a stem, then links one after another, then a tail; every link's output is the feature of a slot.

    A subclass has ``_stem``, ``_tail``, ``_links`` and ``injection_points``; its forward runs them in that order.
    """

    def _links(self) -> tuple[str, ...]:
        """Names of the submodules that are the links, in the order of execution."""
        raise NotImplementedError

    def _stem(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _tail(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def injection_points(self) -> tuple[InjectionPoint, ...]:
        """Places for seeds, row-major."""
        raise NotImplementedError

    def slot_order(self) -> tuple[str, ...]:
        """Slot ids in the order of execution."""
        slots = {point.module: point.slot for point in self.injection_points()}
        return tuple(slots[link] for link in self._links())

    def forward_to(self, x: Tensor, slot: str) -> State:
        """See `Resumable`. ConfigError on an unknown slot."""
        last, _ = places(self.slot_order(), slot, None)
        x = self._stem(x)
        for link in self._links()[:last]:
            x = self.get_submodule(link)(x)
        return (self.get_submodule(self._links()[last]).forward(x),)

    def forward_from(self, state: State, slot: str, *, until: str | None = None) -> Any:
        """See `Resumable`. ConfigError on an unknown slot, ValueError on an ``until`` that is not later."""
        links = self._links()
        first, last = places(self.slot_order(), slot, until)
        (x,) = state
        x = join_slots(self, links[first], x)
        for link in links[first + 1 : last]:
            x = self.get_submodule(link)(x)
        return self._tail(x) if last is None else (self.get_submodule(links[last]).forward(x),)
