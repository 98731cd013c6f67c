"""Feature maps of many nets at once: the blueprints of `esper.kasmina.blueprints.feature_map` and the CNN host.

Nets are folded into the channels, and each is a group of its own: a grouped convolution and a group norm never mix
groups, so no number of one net reaches another.

Shapes: B samples, L lanes (nets in one forward), C channels, H and W. Features are [B, L, C, H, W]; a weight has the
lanes in front of its own axes.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.blueprints.parts import groups_for
from esper.kasmina.hosts.cnn import CNN, ConvStage

W = Mapping[str, Tensor]
LANES = 1  # axis of the lanes
EPS = 1e-5  # of torch's norms


def conv(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, within: bool = False) -> Tensor:
    """A convolution of stride 1 that keeps the resolution, each lane with its own weights.

    Args:
        x: [B, L, I, H, W].
        weight: [L, O, I, k, k], or [L, O, 1, k, k] where each channel has its own.
        bias: [L, O], or None.
        within: each channel has its own.

    Returns:
        [B, L, O, H, W].
    """
    lanes, out = weight.shape[:2]
    if weight.shape[2] == 1 and bias is None:
        return _conv_by_products(x, weight)
    groups = lanes * out if within else lanes
    flat = F.conv2d(
        x.flatten(1, 2),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        padding=weight.shape[-1] // 2,
        groups=groups,
    )
    return flat.unflatten(1, (lanes, out))


def _conv_by_products(x: Tensor, weight: Tensor) -> Tensor:
    """`conv` of one channel without a bias, by one batched product; grouped convolutions take twice as long for it."""
    lanes, reach = weight.shape[0], weight.shape[-1] // 2
    wide = F.pad(x, [reach] * 4).unfold(3, weight.shape[-1], 1).unfold(4, weight.shape[-1], 1)
    columns = wide.permute(1, 2, 5, 6, 0, 3, 4).reshape(lanes, weight[0, 0].numel(), -1)  # [L, k k, B H W]
    out = torch.bmm(weight.flatten(2), columns)
    return out.unflatten(2, (x.shape[0], *x.shape[3:])).permute(2, 0, 1, 3, 4).contiguous()


def pool(x: Tensor) -> Tensor:
    """2x2 max pooling, [B, L, C, H / 2, W / 2]."""
    if torch.is_grad_enabled():
        return F.max_pool2d(x.flatten(1, 2), 2).unflatten(1, x.shape[1:3])
    height, width = (2 * (size // 2) for size in x.shape[3:])
    rows = torch.maximum(x[..., 0:height:2, :width], x[..., 1:height:2, :width])  # the same numbers, sooner
    return torch.maximum(rows[..., 0::2], rows[..., 1::2])


def norm(x: Tensor, w: W, name: str, groups: int | None = None) -> Tensor:
    """Group norm of each lane; ``groups`` a lane, by default those of a seed."""
    lanes, channels = x.shape[1:3]
    many = lanes * (groups_for(channels) if groups is None else groups)
    flat = F.group_norm(x.flatten(1, 2), many, w[f"{name}.weight"].flatten(), w[f"{name}.bias"].flatten(), EPS)
    return flat.unflatten(1, (lanes, channels))


def linear(x_BLC: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[B, L, O] of [B, L, C], weight [L, O, C] and bias [L, O]."""
    return torch.baddbmm(bias[:, None], x_BLC.transpose(0, 1), weight.mT).transpose(0, 1)


def _conv(x: Tensor, w: W, name: str, *, within: bool = False) -> Tensor:
    return conv(x, w[f"{name}.weight"], w[f"{name}.bias"], within=within)


def _scale(x: Tensor, w: W) -> Tensor:
    return x * w["scale.gamma"][..., None, None]


def _noop(x: Tensor, w: W) -> Tensor:
    return torch.zeros_like(x)


def _norm(x: Tensor, w: W) -> Tensor:
    return _scale(norm(x, w, "norm"), w)


def _attention(x: Tensor, w: W) -> Tensor:
    squeezed = F.silu(linear(x.mean(dim=(3, 4)), w["squeeze.weight"], w["squeeze.bias"]))
    gain_BLC = torch.tanh(linear(squeezed, w["excite.weight"], w["excite.bias"]))
    return _scale(x * gain_BLC[..., None, None], w)


def _depthwise(x: Tensor, w: W) -> Tensor:
    return _scale(_conv(F.silu(_conv(norm(x, w, "norm"), w, "within", within=True)), w, "across"), w)


def _bottleneck(x: Tensor, w: W) -> Tensor:
    narrow = F.silu(_conv(norm(x, w, "norm"), w, "down"))
    return _scale(_conv(F.silu(_conv(narrow, w, "middle")), w, "up"), w)


def _conv_small(x: Tensor, w: W) -> Tensor:
    return _scale(_conv(F.silu(_conv(norm(x, w, "norm"), w, "conv")), w, "up"), w)


def _conv_light(x: Tensor, w: W) -> Tensor:
    return _scale(_conv(F.silu(norm(x, w, "norm")), w, "conv"), w)


def _conv_heavy(x: Tensor, w: W) -> Tensor:
    return _scale(_conv(F.silu(_conv(norm(x, w, "norm"), w, "first")), w, "second"), w)


DELTAS: dict[str, Callable[[Tensor, W], Tensor]] = {
    "noop": _noop,
    "norm": _norm,
    "attention": _attention,
    "depthwise": _depthwise,
    "bottleneck": _bottleneck,
    "conv_small": _conv_small,
    "conv_light": _conv_light,
    "conv_heavy": _conv_heavy,
}


def gate(x: Tensor, w: W) -> Tensor:
    """g of `esper.kasmina.slots.gating.BlendGate`, [B, L, 1, 1, 1]."""
    inner = torch.tanh(linear(x.mean((3, 4)), w["inner.weight"], w["inner.bias"]))
    return torch.sigmoid(linear(inner, w["outer.weight"], w["outer.bias"]))[..., None, None]


class ManyCNNs:
    """The forward of `esper.kasmina.hosts.cnn.CNN` for many nets of one shape.

    Args:
        model: one of them.
    """

    lanes_axis, deltas, gate = LANES, DELTAS, staticmethod(gate)

    def __init__(self, model: CNN) -> None:
        self.rows = len(model.stages)
        self.groups = [stage.norm.num_groups for stage in model.stages if isinstance(stage, ConvStage)]
        self.key = tuple(self.groups)

    def arrange(self, x: Tensor, lanes: int) -> Tensor:
        """Features of the gathered samples, given [B * L, C, H, W], in which the lanes change fastest."""
        return x.unflatten(0, (-1, lanes))

    def __call__(self, x: Tensor, w: W, join: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Logits [L, B, K].

        Args:
            x: images [B, L, C, H, W].
            w: weights by the host's own names.
            join: called with each module's name and its output; returns the output with the seeds there.
        """
        for row in range(self.rows):
            name = f"stages.{row}"
            x = conv(x, w[f"{name}.conv.weight"])
            x = join(name, F.relu(norm(x, w, f"{name}.norm", self.groups[row])))
            if row < self.rows - 1:
                x = join(f"pools.{row}", pool(x))
        return linear(x.mean(dim=(3, 4)), w["head.weight"], w["head.bias"]).transpose(0, 1)
