"""Blueprints for sequences, x_BTC -> delta_BTC; in a causal host position t sees positions 0..t only.

    name        delta (gamma is the layer scale)                                parameters at C = 64
    noop        0                                                                                  0
    norm        gamma LN(x)                                                                      192
    lora        gamma U D x                             rank 4, linear, foldable                 576
    lora_large  gamma U D x                             rank 32, linear, foldable              4,160
    mlp_small   gamma W2 gelu(W1 LN(x))                 1 C wide                               8,512
    attention   gamma P softmax(Q K^T / sqrt(d)) V      4 heads, of LN(x)                     16,640
    flex_...    the same as attention                   by FlexAttention where it runs        16,640
    mlp         gamma W2 gelu(W1 LN(x))                 4 C wide                              33,280

``flex_...`` is flex_attention, see `esper.kasmina.blueprints.flex`. All but the attentions look at one position at a
time; `esper.kasmina.blueprints.vector` has four of them for vectors too.
LoRA: Hu et al. 2021; there one factor begins at zero, here both are random and the layer scale keeps the product small.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from esper.kasmina.axes.positions import CAUSAL, Mixing, Positions, attend
from esper.kasmina.blueprints.flex import FLEX, SDPA, attention_backend, flex_causal
from esper.kasmina.blueprints.parts import LayerScale
from esper.kasmina.blueprints.registry import blueprint
from esper.leyline.topology import Reach, Topology

SEQ = Topology.SEQUENCE


@blueprint("noop", topology=SEQ, parameters=lambda dim: 0, flops=lambda dim, positions: 0)
class NoopSequence(nn.Module):
    """No parameters and a delta of zeros: a control, to show that a growth step itself changes nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Returns zeros like ``x_BTC``."""
        return torch.zeros_like(x_BTC)


@blueprint("norm", topology=SEQ, parameters=lambda dim: 3 * dim, flops=lambda dim, positions: 0, min_dim=3)
class NormSequence(nn.Module):
    """A normalised copy: rescales and shifts features per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.scale = LayerScale(dim, SEQ)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.norm(x_BTC))


def _rank(dim: int, rank: int) -> int:
    if rank < 1:
        raise ValueError(f"rank = {rank}: must be >= 1")
    return min(rank, dim)


@blueprint(
    "lora",
    topology=SEQ,
    parameters=lambda dim, rank: 2 * dim * _rank(dim, rank) + dim,
    flops=lambda dim, positions, rank: 4 * positions * dim * _rank(dim, rank),
)
@blueprint(
    "lora_large",
    topology=SEQ,
    parameters=lambda dim, rank: 2 * dim * _rank(dim, rank) + dim,
    flops=lambda dim, positions, rank: 4 * positions * dim * _rank(dim, rank),
    arguments={"rank": 32},
)
class LowRank(nn.Module):
    """A linear map of low rank.

    Args:
        dim: channels.
        rank: rank of the map; at most ``dim`` is used.
    """

    def __init__(self, dim: int, *, rank: int = 4) -> None:
        super().__init__()
        self.down = nn.Linear(dim, _rank(dim, rank), bias=False)
        self.up = nn.Linear(_rank(dim, rank), dim, bias=False)
        self.scale = LayerScale(dim, SEQ, follows=True)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.up(self.down(x_BTC)))


@blueprint(
    "attention",
    topology=SEQ,
    parameters=lambda dim, heads: 4 * dim * dim + 4 * dim,
    flops=lambda dim, positions, heads: 8 * positions * dim * dim + 4 * positions * positions * dim,
    min_dim=3,
    reach=Reach.ALL,
)
class SelfAttention(Mixing):
    """Multi-head self-attention (Vaswani et al. 2017): over the past, in hosts that are not causal over all positions.

    No bias on queries, keys and values: a key bias cancels in the softmax and would never learn.

    Args:
        dim: channels.
        heads: wanted number of heads; the largest number that divides both it and ``dim`` is used.
    """

    remembers = True

    def __init__(self, dim: int, *, heads: int = 4) -> None:
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads = {heads}: must be >= 1")
        self.heads = math.gcd(heads, dim)
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim)
        self.scale = LayerScale(dim, SEQ)

    def forward(self, x_BTC: Tensor, positions: Positions = CAUSAL) -> Tensor:
        """Returns a delta of the same shape."""
        qkv = self.qkv(self.norm(x_BTC)).unflatten(-1, (3, self.heads, -1))
        q_BHTD, k_BHTD, v_BHTD = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # by name: torch.fx reads off it how many
        mixed_BHTD = self._mix(q_BHTD, k_BHTD, v_BHTD, positions)
        return self.scale(self.project(mixed_BHTD.transpose(1, 2).flatten(-2)))

    def _mix(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, positions: Positions) -> Tensor:
        return attend(q_BHTD, k_BHTD, v_BHTD, positions)


@blueprint(
    "flex_attention",
    topology=SEQ,
    parameters=lambda dim, heads: 4 * dim * dim + 4 * dim,
    flops=lambda dim, positions, heads: 8 * positions * dim * dim + 4 * positions * positions * dim,
    min_dim=3,
    backend=attention_backend,
    reach=Reach.ALL,
)
class FlexAttention(SelfAttention):
    """`SelfAttention` by another implementation: same weights, same names, equal within tolerance.

    FLOPs are counted like those of ``attention``: savings of the block mask and padding of heads are left out.

    Args:
        dim: channels.
        heads: as in `SelfAttention`.
        backend: "sdpa" or "flex", as `attention_backend` chose for the device that the seed is built for.
    """

    def __init__(self, dim: int, *, heads: int = 4, backend: str = SDPA) -> None:
        super().__init__(dim, heads=heads)
        self.backend = backend

    def _mix(self, q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, positions: Positions) -> Tensor:
        plain = positions.causal and positions.visible is None and positions.memory is None
        if plain and self.backend == FLEX:
            return flex_causal(q_BHTD, k_BHTD, v_BHTD)
        return super()._mix(q_BHTD, k_BHTD, v_BHTD, positions)


@blueprint(
    "mlp",
    topology=SEQ,
    parameters=lambda dim, expansion: 2 * expansion * dim * dim + expansion * dim + 4 * dim,
    flops=lambda dim, positions, expansion: 4 * positions * expansion * dim * dim,
    min_dim=3,
)
@blueprint(
    "mlp_small",
    topology=SEQ,
    parameters=lambda dim, expansion: 2 * expansion * dim * dim + expansion * dim + 4 * dim,
    flops=lambda dim, positions, expansion: 4 * positions * expansion * dim * dim,
    min_dim=3,
    arguments={"expansion": 1},
)
class MLP(nn.Module):
    """Two-layer perceptron at each position.

    Args:
        dim: channels.
        expansion: hidden width as a multiple of ``dim``.
    """

    def __init__(self, dim: int, *, expansion: int = 4) -> None:
        super().__init__()
        if expansion < 1:
            raise ValueError(f"expansion = {expansion}: must be >= 1")
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, expansion * dim)
        self.down = nn.Linear(expansion * dim, dim)
        self.scale = LayerScale(dim, SEQ)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.down(gelu(self.up(self.norm(x_BTC)))))
