"""A fossil without its slot: the join of a seed's delta and the host's feature as one `torch.fx.GraphModule`.

The graph takes what a forward hook takes, (module, args, output), and returns the output with the joined feature in its
place; so it stands on the host's own submodule as a hook, and the submodule keeps its class, its attributes and its
keys (hosts read attributes of their parts, and a wrapper would hide them).

    operator              joined feature                     in blend it was
    ADD                   h + a delta                        the same
    MULTIPLY              h + h (c a) tanh delta             the same
    GATE, CONFIDENCE      h + delta, at full alpha only      ADD with a (g + (1 - g) a), which is 1 there
    CHANNEL               h + (a v) delta, a v a buffer      the same

Alpha is a constant of the graph: its float32 value, as the slot's.
"""

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper.kasmina.export.tracing import as_graph
from esper.kasmina.slots.blend import MULTIPLY_BOUND
from esper.kasmina.slots.feature import Place
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.rows import Rows
from esper.kasmina.slots.slot import Phase, SeedSlot
from esper.kasmina.streams import undisturbed
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError

Factor = float | Tensor
"""What a delta is multiplied by: one number, or float32 [C] or [C, 1, 1]."""

Formula = Callable[[Any, Any, Any], Any]
"""(h, delta, factor) -> joined feature, in calls that torch.fx can record."""


def _scaled(delta: Any, factor: Any) -> Any:
    if isinstance(factor, float):
        return delta if factor == 1.0 else factor * delta
    return factor.to(delta.dtype) * delta


def add(host: Any, delta: Any, factor: Any) -> Any:
    """h + factor delta."""
    return host + _scaled(delta.to(host.dtype), factor)


def modulate(host: Any, delta: Any, factor: Any) -> Any:
    """h + h factor tanh delta."""
    return host + host * _scaled(torch.tanh(delta.to(host.dtype)), factor)


def _channels(alpha: Tensor, slot: SeedSlot) -> Factor:
    assert slot.channels is not None
    return (alpha * slot.channels).clone()


# Formula, and the factor in it of a slot at an alpha (0-D float32).
JOINS: dict[Operator, tuple[Formula, Callable[[Tensor, SeedSlot], Factor]]] = {
    Operator.ADD: (add, lambda alpha, slot: float(alpha)),
    Operator.MULTIPLY: (modulate, lambda alpha, slot: float(MULTIPLY_BOUND * alpha)),
    Operator.GATE: (add, lambda alpha, slot: 1.0),
    Operator.CONFIDENCE: (add, lambda alpha, slot: 1.0),
    Operator.CHANNEL: (add, _channels),
}
ONLY_FULL = frozenset({Operator.GATE, Operator.CONFIDENCE})
"""Operators that a plain model has at full alpha only, where they are ADD."""

Put = Callable[[Any, Place, Any], Any]


def _put_tuple(output: Any, place: Any, feature: Any) -> Any:
    return output[:place] + (feature,) + output[place + 1 :]  # noqa: RUF005, a proxy cannot be unpacked


def _put_copy(output: Any, place: Any, feature: Any) -> Any:
    twin = output.copy()
    twin.__setitem__(place, feature)  # as a method: torch.fx records no item assignment
    return twin


def _container(output: Any, where: str) -> tuple[Put, bool]:
    """How a feature goes back into such an output, and whether its place is an attribute of it.

    Raises:
        ConfigError: a container that a graph cannot rebuild.
    """
    fields = getattr(output, "_fields", None)
    if isinstance(output, tuple) and fields is not None:
        return (lambda output, place, feature: output._replace(**{fields[place]: feature})), False
    if type(output) is tuple:
        return _put_tuple, False
    if isinstance(output, MutableMapping | list) and hasattr(output, "copy"):
        return _put_copy, False
    if dataclasses.is_dataclass(output):

        def replaced(output: Any, place: Any, feature: Any) -> Any:
            return output.tracer.create_proxy("call_function", dataclasses.replace, (output,), {place: feature})

        return replaced, True
    kind = type(output).__name__
    raise ConfigError(f"{where} returns {kind}; export takes a tensor, tuple, list, mapping or dataclass there")


class _Joined(nn.Module):
    """What is traced, once."""

    def __init__(
        self, seed: nn.Module, formula: Formula, factor: Factor, place: Place, put: Put | None, named: bool
    ) -> None:
        super().__init__()
        self.seed = seed
        self._how = (formula, place, put, named)
        if isinstance(factor, Tensor):
            self.register_buffer("factor", factor)
        else:
            self.factor = factor

    def forward(self, module: Any, args: Any, output: Any) -> Any:
        formula, place, put, named = self._how
        feature = output
        if put is not None:
            feature = getattr(output, str(place)) if named else output[place]
        joined = formula(feature, self.seed(feature), self.factor)
        return joined if put is None else put(output, place, joined)


def join_graph(
    seed: nn.Module, formula: Formula, factor: Factor, *, output: Any, place: Place, where: str
) -> fx.GraphModule:
    """The join as a graph with the seed as its child ``seed``.

    Args:
        seed: of torch's classes (`esper.kasmina.export.tracing.as_graph`).
        formula, factor: see `JOINS`; a number becomes a constant, a tensor the buffer ``factor``.
        output: what the site returned on the example. place: of the feature in it.
        where: what an error calls the site.

    Raises:
        ConfigError: the output is of a kind that a graph cannot rebuild.
    """
    put, named = (None, False) if place is None else _container(output, where)
    module = _Joined(seed, formula, factor, place, put, named)
    graph = as_graph(module, (None, (), output), what=where)
    graph.training = seed.training
    return graph


def delta_like(seed: nn.Module, feature: Tensor) -> Tensor:
    """The seed's delta in eval() where its input needs a gradient; flags and random streams are as before."""
    flags = [(part, part.training) for part in seed.modules()]
    try:
        with torch.enable_grad(), undisturbed(feature, seed=0):
            delta: Tensor = seed.eval()(feature.detach().requires_grad_())
            return delta.detach()
    finally:
        for part, training in flags:
            part.training = training


def alphas_now(grown: Grown) -> dict[str, float]:
    """Alpha that each seed is joined with now, an override before the committed one; 0 for one that takes no part.

    Raises:
        ConfigError: an override is in force that gives every sample an alpha of its own.
    """
    levels = {}
    for slot, holder in grown.slots.items():
        if holder.seed is not None:
            committed = holder.level if holder.phase is Phase.BLEND else 0.0
            if isinstance(holder.overridden, Rows):
                raise ConfigError(f"slot {slot}: its override has an alpha per sample; leave that block first")
            levels[slot] = committed if holder.overridden is None else holder.overridden
    return levels


def refuse(grown: Grown, levels: Mapping[str, float], partial: bool) -> None:
    """ConfigError for seeds that a plain model cannot have, or that nobody asked for."""
    problems, waiting = [], "wait for the end of its ramp"
    for slot, level in levels.items():
        holder = grown.slots[slot]
        if level > 0.0 and holder.fades_from is not None and holder.fade_level < 1.0:
            what = f"is in a cross-fade from {holder.fades_from.name} to {holder.operator.name}"
            problems.append(f"the seed in slot {slot} {what}; {waiting}")
        elif 0.0 < level < 1.0 and holder.operator in ONLY_FULL:
            what = f"is joined by {holder.operator.name} at alpha {level:.3f}, which a plain model has at alpha 1 only"
            problems.append(f"the seed in slot {slot} {what}; {waiting}")
        elif 0.0 < level < 1.0 and not partial:
            problems.append(
                f"the seed in slot {slot} is at alpha {level:.3f}; {waiting}, or export what the model computes now "
                "by partial=True (esper export --partial)"
            )
    if problems:
        raise ConfigError(problems)


if set(JOINS) != set(Operator):
    raise AssertionError(f"operators without a row: {set(Operator) - set(JOINS)}")
