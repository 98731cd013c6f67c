"""Blueprints for signals, x_BCT -> delta_BCT: one-dimensional convolutions, from cheap to expensive.

    name         delta (gamma is the layer scale)                                    parameters at C = 64
    noop         0                                                                                      0
    norm         gamma N(x)                                                                           192
    bottleneck   gamma U silu(K3 silu(D N(x)))                   D, U: 1, K3: 3, C/4 wide           3,104
    depthwise    gamma P silu(D3 N(x))                           D3: 3 per channel, P: 1            4,608
    conv_small   gamma U silu(K3 N(x))                           K3: 3 to C/4, U: 1                 4,368
    conv_light   gamma K3 silu(N(x))                             one full convolution of 3         12,544
    conv_heavy   gamma K3 silu(K3 silu(N(x)))                    two full convolutions of 3        24,896

N normalises each position over its channels, as LayerNorm does for sequences: a GroupNorm would average over time and
so show a causal host its future. There a convolution sees its position and the two before it (van den Oord et al. 2016,
"WaveNet"), elsewhere one on each side.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu

from esper.kasmina.axes.positions import CAUSAL, Mixing, Positions
from esper.kasmina.blueprints.parts import ChannelNorm, LayerScale, narrow
from esper.kasmina.blueprints.registry import blueprint
from esper.leyline.topology import Reach, Topology

SIGNAL = Topology.SIGNAL


def _padded(x_BCT: Tensor, positions: Positions) -> Tensor:
    """Two more positions, for a kernel of 3: before the first, or one on each side."""
    return pad(x_BCT, (2, 0) if positions.causal else (1, 1))


@blueprint("noop", topology=SIGNAL, parameters=lambda dim: 0, flops=lambda dim, positions: 0)
class NoopSignal(nn.Module):
    """No parameters and a delta of zeros: a control, to show that a growth step itself changes nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Returns zeros like ``x_BCT``."""
        return torch.zeros_like(x_BCT)


@blueprint("norm", topology=SIGNAL, parameters=lambda dim: 3 * dim, flops=lambda dim, positions: 0, min_dim=3)
class NormSignal(nn.Module):
    """A normalised copy: rescales and shifts features per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.scale = LayerScale(dim, SIGNAL)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.norm(x_BCT))


@blueprint(
    "depthwise",
    topology=SIGNAL,
    parameters=lambda dim: dim * dim + 8 * dim,
    flops=lambda dim, positions: 2 * positions * (3 * dim + dim * dim),
    min_dim=3,
    reach=Reach.NEAR,
)
class DepthwiseSignal(Mixing):
    """Depthwise separable convolution: 3 within each channel, then 1 across them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.within = nn.Conv1d(dim, dim, 3, groups=dim)
        self.across = nn.Conv1d(dim, dim, 1)
        self.scale = LayerScale(dim, SIGNAL)

    def forward(self, x_BCT: Tensor, positions: Positions = CAUSAL) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.across(silu(self.within(_padded(self.norm(x_BCT), positions)))))


def _bottleneck_parameters(dim: int, reduction: int) -> int:
    width = narrow(dim, reduction)
    return 2 * dim * width + 3 * width * width + 2 * width + 4 * dim


def _bottleneck_flops(dim: int, positions: int, reduction: int) -> int:
    width = narrow(dim, reduction)
    return 2 * positions * (2 * dim * width + 3 * width * width)


@blueprint(
    "bottleneck",
    topology=SIGNAL,
    parameters=_bottleneck_parameters,
    flops=_bottleneck_flops,
    min_dim=3,
    reach=Reach.NEAR,
)
class BottleneckSignal(Mixing):
    """1 down, 3, 1 up (He et al. 2016).

    Args:
        dim: channels.
        reduction: factor by which the middle is narrower than ``dim``.
    """

    def __init__(self, dim: int, *, reduction: int = 4) -> None:
        super().__init__()
        width = narrow(dim, reduction)
        self.norm = ChannelNorm(dim)
        self.down = nn.Conv1d(dim, width, 1)
        self.middle = nn.Conv1d(width, width, 3)
        self.up = nn.Conv1d(width, dim, 1)
        self.scale = LayerScale(dim, SIGNAL)

    def forward(self, x_BCT: Tensor, positions: Positions = CAUSAL) -> Tensor:
        """Returns a delta of the same shape."""
        x = silu(self.down(self.norm(x_BCT)))
        return self.scale(self.up(silu(self.middle(_padded(x, positions)))))


@blueprint(
    "conv_small",
    topology=SIGNAL,
    parameters=lambda dim, reduction: 4 * dim * narrow(dim, reduction) + narrow(dim, reduction) + 4 * dim,
    flops=lambda dim, positions, reduction: 8 * positions * dim * narrow(dim, reduction),
    min_dim=3,
    reach=Reach.NEAR,
)
class ConvSmallSignal(Mixing):
    """A convolution of 3 to a few channels, then 1 back.

    Args:
        dim: channels.
        reduction: factor by which the middle is narrower than ``dim``.
    """

    def __init__(self, dim: int, *, reduction: int = 4) -> None:
        super().__init__()
        width = narrow(dim, reduction)
        self.norm = ChannelNorm(dim)
        self.conv = nn.Conv1d(dim, width, 3)
        self.up = nn.Conv1d(width, dim, 1)
        self.scale = LayerScale(dim, SIGNAL)

    def forward(self, x_BCT: Tensor, positions: Positions = CAUSAL) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.up(silu(self.conv(_padded(self.norm(x_BCT), positions)))))


@blueprint(
    "conv_light",
    topology=SIGNAL,
    parameters=lambda dim: 3 * dim * dim + 4 * dim,
    flops=lambda dim, positions: 6 * positions * dim * dim,
    min_dim=3,
    reach=Reach.NEAR,
)
class ConvLightSignal(Mixing):
    """One full convolution of 3 of the normalised, activated features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.conv = nn.Conv1d(dim, dim, 3)
        self.scale = LayerScale(dim, SIGNAL)

    def forward(self, x_BCT: Tensor, positions: Positions = CAUSAL) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.conv(_padded(silu(self.norm(x_BCT)), positions)))


@blueprint(
    "conv_heavy",
    topology=SIGNAL,
    parameters=lambda dim: 6 * dim * dim + 5 * dim,
    flops=lambda dim, positions: 12 * positions * dim * dim,
    min_dim=3,
    reach=Reach.NEAR,
)
class ConvHeavySignal(Mixing):
    """Two full convolutions of 3 with an activation before each."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.first = nn.Conv1d(dim, dim, 3)
        self.second = nn.Conv1d(dim, dim, 3)
        self.scale = LayerScale(dim, SIGNAL)

    def forward(self, x_BCT: Tensor, positions: Positions = CAUSAL) -> Tensor:
        """Returns a delta of the same shape."""
        x = self.first(_padded(silu(self.norm(x_BCT)), positions))
        return self.scale(self.second(_padded(silu(x), positions)))
