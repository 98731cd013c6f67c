"""The forward of many nets with their seeds, and the join of a slot.

The formulas are those of `esper.kasmina.slots.blend`, with alpha as one number a lane. Lanes without a seat pass a slot
as they are, bit for bit: they are copied, never multiplied by one or added to zero.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.hosts.cnn import CNN
from esper.kasmina.hosts.gpt import GPT
from esper.kasmina.slots.blend import MULTIPLY_BOUND, HostOnly
from esper.kasmina.slots.grown import Grown
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError
from esper.simic.batched.lanes import Group, Plan, Segment
from esper.simic.batched.maps import ManyCNNs
from esper.simic.batched.sequences import ManyGPTs
from esper.simic.batched.weights import GATE, HOST_KEY, Key, Weights

W = Mapping[str, Tensor]


class Form(Protocol):
    """The forward of one kind of host."""

    @property
    def key(self) -> tuple[int | str, ...]:
        """What decides what such hosts compute, beside the shapes of their weights."""

    @property
    def lanes_axis(self) -> int:
        """Axis of the lanes in a feature; the samples are the other one of the first two."""

    @property
    def deltas(self) -> Mapping[str, Callable[[Tensor, W], Tensor]]:
        """What each blueprint adds, given the features of its lanes and its weights."""

    @property
    def gate(self) -> Callable[[Tensor, W], Tensor]:
        """g of GATE, given the same."""

    def arrange(self, x: Tensor, lanes: int) -> Tensor:
        """The host's input of gathered samples, [B * L, ...], in which the lanes change fastest."""

    def __call__(self, x: Tensor, w: W, join: Callable[[str, Tensor], Tensor], /) -> Tensor:
        """Logits [L, B, ...]."""


FORMS: dict[type, Callable[[Any], Form]] = {CNN: ManyCNNs, GPT: ManyGPTs}


def form_of(model: nn.Module) -> Form:
    """The forward of many such hosts.

    Raises:
        ConfigError: this kind of host cannot be stepped together.
    """
    if type(model) not in FORMS:
        names = ", ".join(kind.__name__ for kind in FORMS)
        raise ConfigError(f"a {type(model).__name__} cannot be stepped with others, only {names}; step it alone")
    return FORMS[type(model)](model)


def margin(logits: Tensor) -> Tensor:
    """g of CONFIDENCE, [L, B]: top-1 minus top-2 probability of class logits [L, B, K]."""
    first, second = F.softmax(logits.detach(), -1).topk(2, -1).values.unbind(-1)
    return first - second


class Listener:
    """Takes what a training forward shows beside its output; does nothing."""

    def hear(self, slot: str, feature: Tensor) -> None:
        """Takes the features of all lanes at a slot, before any seed joins."""

    def tally(self, slot: str, lanes: Tensor, g: Tensor) -> None:
        """Takes g_eff of GATE or CONFIDENCE, [n, B], of some lanes."""


class Network:
    """Many nets of one shape.

    Args:
        grown: one of them, attached.
        weights: of them all.
    """

    def __init__(self, grown: Grown, weights: Weights) -> None:
        self.form, self.weights = form_of(grown.model), weights
        self._slots = {site.module: slot for slot, site in grown.sites.items()}

    def run(
        self,
        plan: Plan,
        x: Tensor,
        *,
        leaf: Tensor | None = None,
        confidence: Tensor | None = None,
        listener: Listener | None = None,
    ) -> Tensor:
        """Logits [L, B, ...].

        Args:
            plan: what each lane computes.
            x: gathered samples, [B * L, ...], in which the lanes change fastest.
            leaf: stands for all weights, [S], where a gradient is wanted.
            confidence: g of CONFIDENCE, [L, B]; None where no seat asks for it.
            listener: told of features and gates.
        """
        blocks: dict[Key, Tensor] = {}
        if leaf is not None:
            parts = leaf.split([block.theta.numel() for block in self.weights.blocks.values()])
            blocks = {
                key: part.view_as(block.theta)
                for (key, block), part in zip(self.weights.blocks.items(), parts, strict=True)
            }

        def take(key: Key, rows: Tensor, learning: int, same: bool) -> dict[str, Tensor]:
            block = self.weights.blocks[key]
            live, fixed = blocks.get(key), block.theta
            if live is None or not learning:
                taken = fixed if same else fixed[rows]
            elif learning == len(rows):
                taken = live if same else live[rows]
            else:
                taken = torch.cat([live[rows[:learning]], fixed[rows[learning:]]])
            return block.unpack(taken)

        def join(module: str, feature: Tensor) -> Tensor:
            slot = self._slots.get(module)
            if slot is None:
                return feature
            if listener is not None:
                listener.hear(slot, feature)
            groups = plan.slots.get(slot)
            return feature if not groups else self._join(slot, groups, feature, take, confidence, listener)

        host = take(HOST_KEY, plan.rows, plan.learning, plan.same)
        return self.form(self.form.arrange(x, len(plan.lanes)), host, join)

    def _join(
        self,
        slot: str,
        groups: list[Group],
        feature: Tensor,
        take: Callable[[Key, Tensor, int, bool], dict[str, Tensor]],
        confidence: Tensor | None,
        listener: Listener | None,
    ) -> Tensor:
        axis, joined, lanes = self.form.lanes_axis, [], []
        for group in groups:
            host = feature if group.whole else feature.index_select(axis, group.lanes)
            seen = host.detach() if group.silent else host
            weights = take(group.key, group.rows, group.learning, group.same)
            delta = self.form.deltas[group.key[1]](seen, weights)
            for segment in group.segments:
                part = _Part(self.form, slot, group, segment, host, seen, take, confidence)
                if listener is not None:
                    part.tell(listener)
                joined.append(part.join(delta))
                lanes.append(part.lanes)
        if len(joined) == 1 and groups[-1].whole and len(groups) == 1 and len(lanes[0]) == feature.shape[axis]:
            return joined[0]
        return feature.index_copy(axis, torch.cat(lanes), torch.cat(joined, axis))


class _Part:
    """One segment of a group in one slot."""

    def __init__(
        self,
        form: Form,
        slot: str,
        group: Group,
        segment: Segment,
        host: Tensor,
        seen: Tensor,
        take: Callable[[Key, Tensor, int, bool], dict[str, Tensor]],
        confidence: Tensor | None,
    ) -> None:
        self.form, self.slot, self.group, self.segment = form, slot, group, segment
        self.seat, self.all = segment.seat, segment.last - segment.first == len(group.lanes)
        self.lanes = group.lanes[segment.first : segment.last]
        self.host = self._narrow(host)
        # [n, 1, 1, 1]: the lanes are the fourth axis from behind, in both orders of features
        self.alpha, self.fade = (
            values[segment.first : segment.last].view(-1, 1, 1, 1) for values in (group.alpha, group.fade)
        )
        self.gate = self._gate(self._narrow(seen), take) if self.seat.uses(Operator.GATE) else None
        self.confidence = None
        if self.seat.uses(Operator.CONFIDENCE):
            assert confidence is not None
            g_nB = confidence[self.lanes]
            self.confidence = (g_nB.mT if form.lanes_axis else g_nB)[(..., *[None] * (host.ndim - 2))]

    def _narrow(self, values: Tensor) -> Tensor:
        first, last = self.segment.first, self.segment.last
        return values if self.all else values.narrow(self.form.lanes_axis, first, last - first)

    def _gate(self, x: Tensor, take: Callable[[Key, Tensor, int, bool], dict[str, Tensor]]) -> Tensor:
        rows = torch.tensor(self.group.gates[self.segment.first : self.segment.last], device=x.device)
        learning = len(rows) if self.seat.learns else 0
        return self.form.gate(x, take((self.slot, GATE), rows, learning, False))

    def tell(self, listener: Listener) -> None:
        """Tells a listener of g_eff, where the operator has one."""
        shown = self.gate if self.seat.operator is Operator.GATE or self.confidence is None else self.confidence
        if shown is None:
            return
        g = self._effective(shown.detach()).double().flatten(2).mean(2)
        listener.tally(self.slot, self.lanes, g.mT if self.form.lanes_axis else g)

    def join(self, delta: Tensor) -> Tensor:
        """The host's features with the seed's delta joined; ``delta`` is the whole group's."""
        delta = self._narrow(delta)
        if self.group.silent:
            out: Tensor = HostOnly.apply(self.host, delta, *([] if self.gate is None else [self.gate]))
            return out
        new = self._increment(self.seat.operator, delta)
        if self.seat.fades_from is None:
            return self.host + new
        old = self._increment(self.seat.fades_from, delta)
        dtype = delta.dtype
        return self.host + (1.0 - self.fade).to(dtype) * old + self.fade.to(dtype) * new

    def _increment(self, operator: Operator, delta: Tensor) -> Tensor:
        dtype = delta.dtype
        if operator is Operator.ADD:
            return self.alpha.to(dtype) * delta
        if operator is Operator.MULTIPLY:
            return self.host * ((MULTIPLY_BOUND * self.alpha).to(dtype) * torch.tanh(delta))
        g = self.gate if operator is Operator.GATE else self.confidence
        assert g is not None
        return (self.alpha.to(dtype) * self._effective(g)).to(dtype) * delta

    def _effective(self, g: Tensor) -> Tensor:
        return 1.0 - (1.0 - g) * (1.0 - self.alpha).to(g.dtype)  # alpha is rounded as a slot's is: in float32
