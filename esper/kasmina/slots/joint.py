"""The computation of an active slot: the seed's delta, its strength, and the join of both to the host's features.

Eager code reads "alpha is 0" off the ramp, as a Python number, in `SeedSlot`. Compiled code, in a region or under a
user's own torch.compile around the model, reads it off the tensor: `Joint.join`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.axes.block import Call, OwnBlock
from esper.kasmina.axes.positions import CAUSAL, FREE, Mixing, Positions
from esper.kasmina.axes.site import Site
from esper.kasmina.precision import as_wide
from esper.kasmina.slots.beat import Beat, Circumstances
from esper.kasmina.slots.blend import (
    INCREMENTS,
    Strength,
    blend,
    door,
    effective,
    replace,
    replace_by_tensor,
    select,
    straight_through,
)
from esper.kasmina.slots.gating import Tally, margin
from esper.kasmina.slots.regions import Region
from esper.kasmina.slots.rows import Rows
from esper.kasmina.slots.told import HostMemory, Told, length_of
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError


class Joint(nn.Module):
    """The computing half of `esper.kasmina.slots.slot.SeedSlot`, which owns the attributes and decides when."""

    slot: str
    site: Site | None
    told: Told | None
    called: Call | None
    seed: nn.Module | None
    gate: nn.Module | None
    beat: Beat | None
    operator: Operator
    fades_from: Operator | None
    alpha: Tensor
    fade: Tensor
    channels: Tensor | None
    tally: Tally
    region: Region | None
    degraded: str | None
    _override: float | Rows | None

    def set_gate(self, gate: nn.Module | None) -> None:
        """Registers the gate of GATE, or takes it away."""
        self.gate = gate
        self._note_change()

    def _note_change(self) -> None:
        if self.beat is not None:
            self.beat.changes += 1

    def _join_by_tensor(self, host: Tensor, x: Tensor, alpha: Tensor, *, straight: bool = False) -> Tensor:
        """Calls `join`, compiled if there is a region for it, with the confidence that it needs; tallies the gate."""
        confidence = self._confidence(host)
        region = self.region if self.degraded is None and self.told is None else None  # compiled without a mask
        if isinstance(self.seed, OwnBlock) and self.called is not None:
            further = self.called.has_further(self.seed.site.turned_back(host))
            region = None if further else region  # compiled for a call with the feature alone
        if region is None:
            joined, gate = self.join(host, x, alpha, confidence, straight)
        else:
            if torch.is_grad_enabled() and not host.requires_grad and any(p.requires_grad for p in self.parameters()):
                # The shadow forward before the seed: with a gradient to x it runs the same graph as BLENDING.
                host, x = (host.detach().requires_grad_(),) * 2 if x is host else (host, x)
            joined, gate = region(host, x, alpha, confidence, straight)
            if region.failure is not None:
                self.degraded = f"not compiled any more: {region.failure}"
        self._tally(gate, confidence, alpha)
        return joined

    def rehearse(self, feature: Tensor, *, straight: bool = False) -> Tensor:
        """Calls the region as a forward would, at alpha 1/2, with a made-up confidence and without a tally."""
        assert self.region is not None
        confident = Operator.CONFIDENCE in (self.operator, self.fades_from)
        g = feature.new_full((len(feature), *[1] * (feature.ndim - 1)), 0.5, dtype=torch.float32)
        alpha = torch.full_like(self.alpha, 0.5)
        return self.region(feature, feature, alpha, g if confident else None, straight)[0]

    def join(
        self, host: Tensor, x: Tensor, alpha: Tensor, confidence: Tensor | None, straight: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the slot's output and g of GATE; reads "alpha is 0" off the tensor. A region compiles this method.

        Args:
            host: features at the site, as in `forward`.
            x: the seed's input, as in `forward`.
            alpha: 0-D float32.
            confidence: g of CONFIDENCE, [B, 1, ...], where it is used.
            straight: forward exactly host, gradient as if joined at this alpha.
        """
        closed = alpha == 0
        inner, seen = (host.detach(), x.detach()) if straight else (door(host, closed), door(x, closed))
        gate = self._gate(seen)
        strength = Strength(alpha, gate, confidence, self.channels)
        delta = self._delta(seen, host)
        if isinstance(self.seed, OwnBlock):
            if straight:
                return straight_through(host, alpha * (delta.to(host.dtype) - inner)), gate
            return select(closed, host, replace_by_tensor(inner, delta, alpha)), gate
        if straight:
            return straight_through(host, INCREMENTS[self.operator](inner, delta.to(host.dtype), strength)), gate
        blended = blend(inner, delta, strength, self.operator, self.fades_from, self.fade)
        return select(closed, host, blended), gate

    def _join_output(self, output: Any) -> Any:
        raise NotImplementedError

    def _join_again(self, output: Any, again: Circumstances) -> Any:
        """`_join_output` in a part of a forward that is run again for backward, as it was in that forward."""
        assert self.beat is not None
        beat = self.beat
        before = self._override, beat.logits, beat.weights
        self._override, beat.logits, beat.weights = again.overrides.get(self.slot), again.logits, None
        try:
            return self._join_output(output)
        finally:
            self._override, beat.logits, beat.weights = before

    def _join_rows(self, host: Tensor, x: Tensor, rows: Rows) -> Tensor:
        rows.check(host, self.slot)
        if not len(rows.chosen):
            return host
        if isinstance(self.seed, OwnBlock):  # its further arguments are of the whole batch
            alphas = rows.alphas.to(host.device).view(-1, *[1] * (host.ndim - 1))
            return select(alphas == 0, host, replace_by_tensor(host, self._delta(x, host), alphas))
        at = rows.chosen.to(host.device)
        host_rows, x_rows = host[at], x[at]
        strength = self._strength(host_rows, x_rows, rows.strength(host), rows)
        delta = self._delta(x_rows, host_rows, rows)
        joined = blend(host_rows, delta, strength, self.operator, self.fades_from, self.fade)
        return host.index_copy(0, at, joined)

    def _blend(self, host: Tensor, x: Tensor, level: float, alpha: Tensor) -> Tensor:
        """The slot's output at an alpha above 0, in eager code, where it is also known as a number."""
        if isinstance(self.seed, OwnBlock):
            return replace(host, self._delta(x, host), alpha, full=level == 1.0)
        strength = self._strength(host, x, alpha)
        return blend(host, self._delta(x, host), strength, self.operator, self.fades_from, self.fade)

    def _strength(self, host: Tensor, x: Tensor, alpha: Tensor, rows: Rows | None = None) -> Strength:
        """Returns the factors that the operators in use need; tallies g_eff in a training forward that is tallied."""
        gate, confidence = self._gate(x), self._confidence(host, rows)
        self._tally(gate, confidence, alpha)
        return Strength(alpha, gate, confidence, self.channels)

    def _gate(self, x: Tensor) -> Tensor | None:
        if Operator.GATE not in (self.operator, self.fades_from):
            return None
        if self.gate is None:
            raise ConfigError(f"slot {self.slot}: GATE without a gate; give it one (slot.gate = build_gate(...))")
        if self.told is not None and self.told.cache is not None and self.site is not None:
            length = x.shape[self.site.topology.value.index("T")]
            if length_of(self.told.cache) not in (0, length, None):
                raise ConfigError(
                    f"slot {self.slot}: GATE pools over all positions and lacks those before this call; call with "
                    "use_cache=False until the ramp is over"
                )
        return self.gate(x)

    def _confidence(self, host: Tensor, rows: Rows | None = None) -> Tensor | None:
        if Operator.CHANNEL in (self.operator, self.fades_from) and self.channels is None:
            raise ConfigError(f"slot {self.slot}: CHANNEL without a vector v; set slots.channels.{self.slot}")
        if Operator.CONFIDENCE not in (self.operator, self.fades_from):
            return None
        g = margin(None if self.beat is None else self.beat.logits, len(rows.alphas if rows else host), self.slot)
        g = g[rows.chosen.to(g.device)] if rows else g
        return g.view(-1, *[1] * (host.ndim - 1))

    def _tally(self, gate: Tensor | None, confidence: Tensor | None, alpha: Tensor) -> None:
        tallied = gate if self.operator is Operator.GATE or confidence is None else confidence
        if tallied is not None and self._override is None and self.beat is not None and self.beat.weights is not None:
            # Detached: what is computed again for backward is not tallied again, and must save as many tensors.
            self.tally.add(effective(tallied.detach(), alpha), self.beat.weights)

    def _positions(self, x: Tensor, rows: Rows | None = None) -> Positions:
        """What a seed that mixes positions is told of the call."""
        causal = self.site is None or self.site.causal
        again = None if self.beat is None or torch.compiler.is_compiling() else self.beat.again
        told = self.told if again is None else again.told.get(self.slot)
        if told is None or self.site is None:
            return CAUSAL if causal else FREE
        if rows is not None:
            told = told.rows(rows.chosen.to(x.device), len(rows.alphas))
        length = x.shape[self.site.topology.value.index("T")]
        memory = self._memory(told.cache, length, rows) if told.cache is not None else None
        return Positions(causal, told.visible if told.masks else None, memory)

    def _memory(self, cache: Any, length: int, rows: Rows | None) -> HostMemory | None:
        """The seed's memory in the host's cache; None where no call before this one matters, nor one after it."""
        assert self.site is not None
        fresh = length_of(cache) in (0, length)  # the host may have added this call's already
        lacks = not self.site.causal or not getattr(self.seed, "remembers", False)
        if fresh and (torch.is_grad_enabled() or rows is not None or lacks):
            return None
        if lacks or rows is not None:
            why = "" if self.site.causal else ", in a host that is not causal"
            why = ", with an alpha per sample" if rows is not None else why
            raise ConfigError(
                f"slot {self.slot}: {type(self.seed).__name__} mixes positions and lacks those before this call{why}; "
                "call with use_cache=False, or grow a blueprint that looks at one position at a time"
            )
        memory = HostMemory(cache, self.slot, 0 if self.beat is None else self.beat.host_layers)
        memory.check(length)
        return memory

    def _delta(self, x: Tensor, host: Tensor, rows: Rows | None = None) -> Tensor:
        assert self.seed is not None
        wide = as_wide(x, self.seed)
        if isinstance(self.seed, OwnBlock):
            self._number_layers(x, self.called)
            delta = self.seed(wide, self.called)
        else:
            delta = self.seed(wide, self._positions(x, rows)) if isinstance(self.seed, Mixing) else self.seed(wide)
        if delta.shape != host.shape:
            raise ValueError(f"seed in {self.slot} returned {tuple(delta.shape)} for features {tuple(host.shape)}")
        return delta

    def _number_layers(self, x: Tensor, call: Call | None) -> None:
        """Gives a block's attention a layer of its own in the host's cache, behind the host's own layers."""
        cache = None if call is None or torch.compiler.is_compiling() else call.cache
        if cache is None or self.site is None or not self.site.topology.has_length:
            return
        assert self.seed is not None
        memory = HostMemory(cache, self.slot, 0 if self.beat is None else self.beat.host_layers)
        memory.check(x.shape[self.site.topology.value.index("T")])
        index = memory.open_layer()
        for module in self.seed.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = index  # type: ignore[assignment]
