"""The join of a seed without its slot: delta and host feature become one `torch.fx.GraphModule`.

The graph takes what a forward hook takes, (module, args, output), and returns the output with the joined feature in its
place. So it is registered as a hook on the host's own submodule, which keeps its class, its attributes and its keys
(hosts read attributes of their parts, and a wrapper would hide them).

    operator              joined feature                     in blend it was
    ADD                   h + a delta                        the same
    MULTIPLY              h + h (c a) tanh delta             the same
    GATE, CONFIDENCE      h + delta, at full alpha only      ADD with a (g + (1 - g) a), which is 1 there
    CHANNEL               h + (a v) delta, a v a buffer      the same

Alpha is a constant of the graph: its float32 value, equal to the slot's.

The formulas are those of `esper.kasmina.slots.blend`, written again as calls that torch.fx can record: there alpha is a
tensor, and a branch on its shape would become an assertion in the graph. Both use one `MULTIPLY_BOUND`, and every
export compares its output with the grown model's.
"""

import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from esper.kasmina.axes.feature import Place, take
from esper.kasmina.axes.site import Site
from esper.kasmina.export.listening import Listening
from esper.kasmina.export.tracing import as_graph
from esper.kasmina.precision import as_wide
from esper.kasmina.slots.blend import MULTIPLY_BOUND
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.rows import Rows
from esper.kasmina.slots.slot import Phase, SeedSlot
from esper.kasmina.streams import undisturbed
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError

Factor = float | Tensor
"""The factor of a delta: one number, or float32 [C] or [C, 1, 1]."""

Formula = Callable[[Any, Any, Any], Any]
"""(h, delta, factor) -> joined feature, in calls that torch.fx can record."""


def _apply_factor(delta: Any, factor: Any) -> Any:
    """Multiplies; a number becomes a constant of the graph (none for 1), a tensor is cast to the delta's dtype."""
    if isinstance(factor, float):
        return delta if factor == 1.0 else factor * delta
    return factor.to(delta.dtype) * delta


def add(host: Any, delta: Any, factor: Any) -> Any:
    """Computes h + factor delta."""
    return host + _apply_factor(delta.to(host.dtype), factor)


def move_to(host: Any, block: Any, factor: Any) -> Any:
    """Computes h + factor (block - h), and the block itself where the factor is 1."""
    block = block.to(host.dtype)
    return block if factor == 1.0 else host + _apply_factor(block - host, factor)


def modulate(host: Any, delta: Any, factor: Any) -> Any:
    """Computes h + h factor tanh delta."""
    return host + host * _apply_factor(torch.tanh(delta.to(host.dtype)), factor)


def _channels(alpha: Tensor, slot: SeedSlot) -> Factor:
    assert slot.channels is not None
    return (alpha * slot.channels).clone()


def _number(factor: Tensor, slot: SeedSlot) -> float:
    """A 0-D factor as the number that `esper.kasmina.slots.blend` multiplies with: rounded to the delta's dtype."""
    weight = next((p for p in slot.parameters() if p.is_floating_point()), factor)
    dtype = slot._dtypes.get(None, weight.dtype)  # of the feature, to which a delta is cast
    return float(factor.to(dtype) if dtype in (torch.float16, torch.bfloat16) else factor)


# The formula of each operator, and a function from alpha (0-D float32) and slot to the factor in it.
JOINS: dict[Operator, tuple[Formula, Callable[[Tensor, SeedSlot], Factor]]] = {
    Operator.ADD: (add, lambda alpha, slot: _number(alpha, slot)),
    Operator.MULTIPLY: (modulate, lambda alpha, slot: _number(MULTIPLY_BOUND * alpha, slot)),
    Operator.GATE: (add, lambda alpha, slot: 1.0),
    Operator.CONFIDENCE: (add, lambda alpha, slot: 1.0),
    Operator.CHANNEL: (add, _channels),
}
ONLY_FULL = frozenset({Operator.GATE, Operator.CONFIDENCE})
"""Operators that a plain model supports at full alpha only, where they equal ADD."""

Put = Callable[[Any, Place, Any], Any]


def _put_tuple(output: Any, place: Any, feature: Any) -> Any:
    return output[:place] + (feature,) + output[place + 1 :]  # noqa: RUF005, a proxy cannot be unpacked


def _put_copy(output: Any, place: Any, feature: Any) -> Any:
    twin = output.copy()
    twin.__setitem__(place, feature)  # as a method: torch.fx records no item assignment
    return twin


def _container(output: Any, where: str) -> tuple[Put, bool]:
    """Returns a function that puts a feature back into such an output, and whether its place there is an attribute.

    Raises:
        ConfigError: a graph cannot rebuild such a container.
    """
    fields = getattr(output, "_fields", None)
    if isinstance(output, tuple) and fields is not None:
        return (lambda output, place, feature: output._replace(**{fields[place]: feature})), False
    if type(output) is tuple:
        return _put_tuple, False
    if isinstance(output, MutableMapping | list) and hasattr(output, "copy"):
        return _put_copy, False
    if dataclasses.is_dataclass(output):

        def replace_field(output: Any, place: Any, feature: Any) -> Any:
            return output.tracer.create_proxy("call_function", dataclasses.replace, (output,), {place: feature})

        return replace_field, True
    kind = type(output).__name__
    raise ConfigError(f"{where} returns {kind}; export takes a tensor, tuple, list, mapping or dataclass there")


class _Joined(nn.Module):
    """The module that is traced to make the graph."""

    def __init__(
        self,
        seed: nn.Module,
        formula: Formula,
        factor: Factor,
        site: Site,
        put: Put | None,
        named: bool,
        wide: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.seed, self._wide = seed, wide
        self._how = (formula, site, put, named)
        if isinstance(factor, Tensor):
            self.register_buffer("factor", factor)
        else:
            self.factor = factor

    def forward(self, module: Any, args: Any, output: Any) -> Any:
        return self._join(output)

    def _join(self, output: Any, *told: Any) -> Any:
        formula, site, put, named = self._how
        place = site.place
        feature = output
        if put is not None:
            feature = getattr(output, str(place)) if named else output[place]
        feature = site.turned(feature)
        wide = feature if self._wide is None else feature.to(self._wide)
        joined = site.turned_back(formula(feature, self.seed(wide, *told), self.factor))
        return joined if put is None else put(output, place, joined)


class _Listens(_Joined):
    """One whose seed reads the call, too; for a hook with keyword inputs."""

    listening: Listening

    def forward(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:  # type: ignore[override]
        return self._join(output, self.listening.collect(module, args, kwargs))


def join_graph(
    seed: nn.Module,
    formula: Formula,
    factor: Factor,
    *,
    output: Any,
    site: Site,
    listening: Listening | None = None,
) -> fx.GraphModule:
    """Returns the join as a graph with the seed as its child ``seed``.

    Args:
        seed: a module of torch's classes (see `esper.kasmina.export.tracing.as_graph`).
        formula: the joined feature from h, delta and factor; see `JOINS`.
        factor: the factor in it; a number becomes a constant, a tensor the buffer ``factor``.
        output: what the site returned on the example.
        site: the place of the feature in that output, and its axes.
        listening: how the seed reads the call; None if it takes the feature alone.

    Raises:
        ConfigError: a graph cannot rebuild such an output.
    """
    where = f"site {site.module!r} of slot {site.slot}"
    put, named = (None, False) if site.place is None else _container(output, where)
    feature = take(output, site.place)
    wide = as_wide(feature, seed).dtype
    cast = None if wide is feature.dtype else wide
    if listening is None:
        module = _Joined(seed, formula, factor, site, put, named, cast)
        graph = as_graph(module, (None, (), output), what=where)
    else:
        module = _Listens(seed, formula, factor, site, put, named, cast)
        module.listening = listening
        graph = as_graph(module, (None, (), {}, output), what=where)
    graph.training = seed.training
    return graph


def compute_delta(seed: nn.Module, feature: Tensor, *told: Any) -> Tensor:
    """Computes the seed's delta in eval(), with an input that needs a gradient; flags and random streams stay."""
    flags = [(part, part.training) for part in seed.modules()]
    try:
        with torch.enable_grad(), undisturbed(feature, seed=0):
            delta: Tensor = seed.eval()(as_wide(feature.detach(), seed).requires_grad_(), *told)
            return delta.detach()
    finally:
        for part, training in flags:
            part.training = training


def current_alphas(grown: Grown) -> dict[str, float]:
    """Returns the alpha of each seed now: that of an override, else the committed one; 0 for an inactive seed.

    Raises:
        ConfigError: an override with one alpha per sample is in force.
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
    """Refuses seeds that a plain model cannot contain, unfinished ones unless ``partial`` asks for them, and a host
    whose forward somebody has replaced.

    Raises:
        ConfigError: the text names each such seed, or module.
    """
    problems, waiting = [], "wait for the end of its ramp"
    for name, module in grown.model.named_modules():
        if "_original_forward" in vars(module):
            problems.append(
                f"the forward of {name or 'the model'} was replaced on the object, as accelerate does for mixed "
                "precision; put its own back before: accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
            )
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
