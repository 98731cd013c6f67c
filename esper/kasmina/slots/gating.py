"""The factors that scale a delta per sample: the trained gate of GATE, the margin of CONFIDENCE; and tallies.

    GATE        pool -> linear -> tanh -> linear -> sigmoid      g in (0, 1)
    CONFIDENCE  top-1 minus top-2 softmax probability            g in [0, 1]

A feature map is pooled by its mean over positions. A sequence or a signal is pooled by its *running* mean over
positions 0..t, with a g for each position, since a mean over all of them would show a causal host its future. tanh
bounds the sigmoid's input, which large features would otherwise saturate: every tensor of the gate keeps a live
gradient.

Shapes: B samples, C channels, T positions, H hidden units, K classes.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.axes.feature import take
from esper.kasmina.axes.site import Site
from esper.kasmina.slots.beat import Beat
from esper.leyline.errors import ConfigError
from esper.leyline.topology import Topology


class BlendGate(nn.Module):
    """g of GATE. Lives while a seed is blended under GATE; (C + 2) H + 1 parameters, H = max(4, C // 8).

    Args:
        dim: channels C of the slot.
        topology: what the axes of its features mean.
    """

    def __init__(self, dim: int, topology: Topology) -> None:
        super().__init__()
        hidden = max(4, dim // 8)
        self.topology = topology
        self.inner = nn.Linear(dim, hidden)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Returns g for features x, float32 or wider: [B, 1, 1, 1], [B, T, 1], [B, 1, T] or [B, 1]."""
        pooled = self._pool(x).to(self.inner.weight.dtype)
        z = self.outer(torch.tanh(self.inner(pooled)))
        g = torch.sigmoid(z.to(torch.promote_types(z.dtype, torch.float32)))
        if self.topology is Topology.SIGNAL:
            return g.mT
        return g[:, :, None, None] if self.topology is Topology.FEATURE_MAP else g

    def _pool(self, x: Tensor) -> Tensor:
        if self.topology is Topology.VECTOR:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.topology is Topology.FEATURE_MAP:
            return wide.mean((2, 3))
        wide = wide.mT if self.topology is Topology.SIGNAL else wide
        count = torch.arange(1, wide.shape[1] + 1, device=x.device, dtype=wide.dtype)
        return wide.cumsum(1) / count[:, None]


def margin(logits: object, samples: int, slot: str) -> Tensor:
    """Computes g of CONFIDENCE: top-1 minus top-2 probability, [B], float32 or wider, without a gradient.

    Args:
        logits: class logits [B, K >= 2].
        samples: batch size B of the features that they belong to.
        slot: slot id, for the error.

    Raises:
        ConfigError: ``logits`` is missing, or is anything but such class logits.
    """
    if not isinstance(logits, Tensor):
        got = "nothing" if logits is None else type(logits).__name__
    elif not logits.is_floating_point() or logits.ndim != 2 or logits.shape[1] < 2 or logits.shape[0] != samples:
        got = f"{logits.dtype} {list(logits.shape)}"
    else:
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        first, second = F.softmax(wide, -1).topk(2, -1).values.unbind(-1)
        return first - second
    raise ConfigError(
        f"slot {slot}: CONFIDENCE got {got} for {samples} samples, needs class logits [B, K >= 2]; hand them in by "
        "`with grown.logits(tensor):` around the forward"
    )


class Tally:
    """Count, sum and sum of squares of g_eff over training samples, kept on the device; `add` never waits for it.

    A sequence is one sample: its g_eff is the mean over positions.
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # float64 [3]

    def add(self, g: Tensor, weights: Tensor) -> None:
        """Adds the samples of one forward.

        Args:
            g: g_eff, [B, 1, ...], [B, T, 1] or [B, 1, T].
            weights: [B], 1 for a sample, 0 for a stand-in that does not count; 0-D: the same for all.

        Raises:
            ValueError: the number of weights is not the number of samples.
        """
        weights = weights.expand(g.shape[0]) if weights.ndim == 0 else weights
        if weights.shape != g.shape[:1]:
            raise ValueError(f"{list(weights.shape)} sample weights for {g.shape[0]} samples: need one per sample")
        g, w = g.detach().double().flatten(1).mean(1), weights.double()
        sums = torch.stack([w.sum(), (w * g).sum(), (w * g * g).sum()])
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums

    def take(self) -> tuple[float, float, float]:
        """Reads the three sums and begins anew; waits for the device."""
        count, total, squares = (0.0, 0.0, 0.0) if self._sums is None else self._sums.tolist()
        self._sums = None
        return count, total, squares

    @property
    def sums(self) -> Tensor | None:
        """The present sums, float64 [3] on the device, never changed in place; None when nothing was added."""
        return self._sums

    def state(self) -> Tensor | None:
        """Returns the present sums, float64 [3] on the CPU; None when nothing was added."""
        return None if self._sums is None else self._sums.cpu().clone()

    def load(self, state: Tensor | None) -> None:
        """Puts back what `state` returned."""
        self._sums = state


class Heard(Tally):
    """How large a site's feature is in training forwards, while a seed waits there to be born.

    Count and sum over training samples of the feature's mean square; empty unless it listens.

    Fields:
        listening: whether it tallies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.listening = False

    def listen(self, on: bool) -> None:
        """Begins anew, or ends."""
        self.listening = on
        self.load(None)

    def hear(self, output: Any, site: Site | None, beat: Beat | None) -> None:
        """Tallies the output of a site, if this is a training forward and no recomputation of one."""
        if not self.listening:
            return
        assert site is not None
        assert beat is not None
        weights, feature = beat.weights, take(output, site.place)
        if weights is None or beat.again is not None or not isinstance(feature, Tensor):
            return
        squares = site.turned(feature.detach()).float().square().flatten(1).mean(1, keepdim=True)
        fits = weights.ndim == 0 or len(weights) == len(squares)  # a window of a sample may be a row of its own
        self.add(squares, weights if fits else weights.new_ones(()))
