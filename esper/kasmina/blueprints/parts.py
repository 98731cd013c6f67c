"""Parts that blueprints and hosts share: the layer scale that ends every seed, and a GroupNorm safe in any layout.

LayerScale (Touvron et al. 2021, "Going deeper with image transformers"): delta = gamma * f(x) with one gamma per
channel. Twists: gamma begins small but not at zero. At zero nothing before it would get a gradient in the first step,
and a norm or ReLU after a zero init can stay dead for good; at 0.1 the delta is small and all of the seed learns. And
gamma begins in proportion to the features at the site (`set_size`), since f normalises its input: at an absolute size
a delta would drown small features, and be inaudible among large ones.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from esper.leyline.topology import Topology

LAYER_SCALE_INIT = 0.1


class LayerScale(nn.Module):
    """Multiplies each channel by a learned factor.

    Args:
        dim: channels C.
        topology: says which axis is C.
        follows: whether f(x) is as large as x is, since nothing in f normalises.
    """

    def __init__(self, dim: int, topology: Topology, *, follows: bool = False) -> None:
        super().__init__()
        self.follows = follows
        self.gamma = nn.Parameter(torch.full((dim,), LAYER_SCALE_INIT))
        self.trailing = topology.ndim - topology.channel_axis - 1

    def set_size(self, size: float, features: float, share: float = LAYER_SCALE_INIT) -> None:
        """Sets gamma at birth.

        Args:
            size: root mean square of what the delta is measured by: of the features where it is added to them, 1 where
                it multiplies them.
            features: root mean square of the features.
            share: of ``size`` that gamma begins with.
        """
        with torch.no_grad():
            self.gamma.fill_(share * (size / features if self.follows else size))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the same shape and memory format as ``x``."""
        return x * self.gamma.view(-1, *[1] * self.trailing)


def groups_for(dim: int) -> int:
    """Chooses the groups of a GroupNorm over ``dim`` channels: at most 8, of equal size, if possible of two or more.

    A group of one channel at one position has nothing to normalise: its output would be the bias, whatever the input.
    """
    return next(groups for groups in range(min(8, max(1, dim // 2)), 0, -1) if dim % groups == 0)


def values_per_group(dim: int, positions: int) -> int:
    """How many values a group of `group_norm` has."""
    return dim // groups_for(dim) * positions


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm, safe for a channels-last input that needs no gradient on CPU.

    For such an input torch (seen in 2.13) crashes the process in the backward of weight and bias, and a seed's detached
    input is exactly that case. The same sums are then computed over a view, without a copy to contiguous; where no
    gradient is recorded at all, torch's own kernel is safe and four times faster.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, H, W] to the same shape and memory format."""
        channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
        if x.requires_grad or not torch.is_grad_enabled() or not channels_last or x.device.type != "cpu":
            return super().forward(x)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        x_BGCHW = wide.unflatten(1, (self.num_groups, -1))
        var, mean = torch.var_mean(x_BGCHW, dim=(2, 3, 4), keepdim=True, correction=0)
        normal = ((x_BGCHW - mean) * torch.rsqrt(var + self.eps)).flatten(1, 2)
        return (normal * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)).to(x.dtype)


class ChannelNorm(nn.LayerNorm):
    """nn.LayerNorm over the channels of [B, C, T], position by position.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [B, C, T] to the same shape."""
        normal = layer_norm(x.transpose(1, 2), self.normalized_shape, self.weight, self.bias, self.eps)
        return normal.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def group_norm(dim: int) -> GroupNorm:
    """Makes a GroupNorm for ``dim`` channels with `groups_for` groups."""
    return GroupNorm(groups_for(dim), dim)


def narrow(dim: int, reduction: int) -> int:
    """Computes a bottleneck's width: ``dim / reduction``, at least 2 (one channel would carry a single direction)."""
    if reduction < 1:
        raise ValueError(f"reduction = {reduction}: must be >= 1")
    return max(2, dim // reduction)
