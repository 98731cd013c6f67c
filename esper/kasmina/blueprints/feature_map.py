"""Blueprints for feature maps, x_BCHW -> delta_BCHW, from cheap to expensive.

    name         delta (gamma is the layer scale)                                    parameters at C = 64
    noop         0                                                                                      0
    norm         gamma GN(x)                                                                          192
    attention    gamma x tanh(W2 silu(W1 mean_HW x))             squeeze-and-excitation             2,192
    bottleneck   gamma U silu(K3 silu(D GN(x)))                  D, U: 1x1, K3: 3x3, C/4 wide       4,640
    depthwise    gamma P silu(D3 GN(x))                          D3: 3x3 per channel, P: 1x1        4,992
    conv_small   gamma U silu(K3 GN(x))                          K3: 3x3 to C/4, U: 1x1            10,512
    conv_light   gamma K3 silu(GN(x))                            one full 3x3                      37,120
    conv_heavy   gamma K3 silu(K3 GN(x))                         two full 3x3                      74,048

Squeeze-and-excitation: Hu et al. 2018; tanh in place of their sigmoid, since a delta must be able to have either sign.
SiLU rather than ReLU, so that no unit is born dead; GroupNorm rather than BatchNorm, so that nothing depends on the
batch or differs between ranks.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from esper.kasmina.blueprints.parts import LayerScale, group_norm, narrow, values_per_group
from esper.kasmina.blueprints.registry import blueprint
from esper.leyline.topology import Reach, Topology

MAP = Topology.FEATURE_MAP


@blueprint("noop", topology=MAP, parameters=lambda dim: 0, flops=lambda dim, positions: 0, reach=Reach.POINT)
class NoopMap(nn.Module):
    """No parameters and a delta of zeros: a control, to show that a growth step itself changes nothing."""

    def __init__(self, dim: int) -> None:
        super().__init__()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns zeros like ``x_BCHW``."""
        return torch.zeros_like(x_BCHW)


@blueprint(
    "norm",
    topology=MAP,
    parameters=lambda dim: 3 * dim,
    flops=lambda dim, positions: 0,
    normalises=values_per_group,
    reach=Reach.POINT,
)
class NormMap(nn.Module):
    """A normalised copy: rescales and shifts features per channel."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = group_norm(dim)
        self.scale = LayerScale(dim, MAP)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.norm(x_BCHW))


def _attention_parameters(dim: int, reduction: int) -> int:
    width = narrow(dim, reduction)
    return 2 * dim * width + width + 2 * dim


@blueprint(
    "attention",
    topology=MAP,
    parameters=_attention_parameters,
    flops=lambda dim, positions, reduction: 4 * dim * narrow(dim, reduction),
    reach=Reach.ALL,
)
class SqueezeExcite(nn.Module):
    """Reweights channels by their means over the whole map.

    Args:
        dim: channels.
        reduction: factor by which the squeeze is narrower than ``dim``.
    """

    def __init__(self, dim: int, *, reduction: int = 4) -> None:
        super().__init__()
        width = narrow(dim, reduction)
        self.squeeze = nn.Linear(dim, width)
        self.excite = nn.Linear(width, dim)
        self.scale = LayerScale(dim, MAP, follows=True)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns a delta of the same shape, |delta| <= |gamma x|."""
        gain_BC = torch.tanh(self.excite(silu(self.squeeze(x_BCHW.mean(dim=(2, 3))))))
        return self.scale(x_BCHW * gain_BC[:, :, None, None])


@blueprint(
    "depthwise",
    topology=MAP,
    parameters=lambda dim: dim * dim + 14 * dim,
    flops=lambda dim, positions: 2 * positions * (9 * dim + dim * dim),
    normalises=values_per_group,
    reach=Reach.NEAR,
)
class Depthwise(nn.Module):
    """Depthwise separable convolution: 3x3 within each channel, then 1x1 across them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = group_norm(dim)
        self.within = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.across = nn.Conv2d(dim, dim, 1)
        self.scale = LayerScale(dim, MAP)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.across(silu(self.within(self.norm(x_BCHW)))))


def _bottleneck_parameters(dim: int, reduction: int) -> int:
    width = narrow(dim, reduction)
    return 2 * dim * width + 9 * width * width + 2 * width + 4 * dim


def _bottleneck_flops(dim: int, positions: int, reduction: int) -> int:
    width = narrow(dim, reduction)
    return 2 * positions * (2 * dim * width + 9 * width * width)


@blueprint(
    "bottleneck",
    topology=MAP,
    parameters=_bottleneck_parameters,
    flops=_bottleneck_flops,
    normalises=values_per_group,
    reach=Reach.NEAR,
)
class Bottleneck(nn.Module):
    """1x1 down, 3x3, 1x1 up (He et al. 2016).

    Args:
        dim: channels.
        reduction: factor by which the middle is narrower than ``dim``.
    """

    def __init__(self, dim: int, *, reduction: int = 4) -> None:
        super().__init__()
        width = narrow(dim, reduction)
        self.norm = group_norm(dim)
        self.down = nn.Conv2d(dim, width, 1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.up = nn.Conv2d(width, dim, 1)
        self.scale = LayerScale(dim, MAP)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        x = silu(self.down(self.norm(x_BCHW)))
        return self.scale(self.up(silu(self.middle(x))))


@blueprint(
    "conv_small",
    topology=MAP,
    parameters=lambda dim, reduction: 10 * dim * narrow(dim, reduction) + narrow(dim, reduction) + 4 * dim,
    flops=lambda dim, positions, reduction: 20 * positions * dim * narrow(dim, reduction),
    normalises=values_per_group,
    reach=Reach.NEAR,
)
class ConvSmall(nn.Module):
    """A 3x3 convolution to a few channels, then 1x1 back.

    Args:
        dim: channels.
        reduction: factor by which the middle is narrower than ``dim``.
    """

    def __init__(self, dim: int, *, reduction: int = 4) -> None:
        super().__init__()
        width = narrow(dim, reduction)
        self.norm = group_norm(dim)
        self.conv = nn.Conv2d(dim, width, 3, padding=1)
        self.up = nn.Conv2d(width, dim, 1)
        self.scale = LayerScale(dim, MAP)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.up(silu(self.conv(self.norm(x_BCHW)))))


@blueprint(
    "conv_light",
    topology=MAP,
    parameters=lambda dim: 9 * dim * dim + 4 * dim,
    flops=lambda dim, positions: 18 * positions * dim * dim,
    normalises=values_per_group,
    reach=Reach.NEAR,
)
class ConvLight(nn.Module):
    """One full 3x3 convolution of the normalised, activated features."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = group_norm(dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.scale = LayerScale(dim, MAP)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.conv(silu(self.norm(x_BCHW))))


@blueprint(
    "conv_heavy",
    topology=MAP,
    parameters=lambda dim: 18 * dim * dim + 5 * dim,
    flops=lambda dim, positions: 36 * positions * dim * dim,
    normalises=values_per_group,
    reach=Reach.NEAR,
)
class ConvHeavy(nn.Module):
    """Two full 3x3 convolutions with an activation between."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = group_norm(dim)
        self.first = nn.Conv2d(dim, dim, 3, padding=1)
        self.second = nn.Conv2d(dim, dim, 3, padding=1)
        self.scale = LayerScale(dim, MAP)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Returns a delta of the same shape."""
        return self.scale(self.second(silu(self.first(self.norm(x_BCHW)))))
