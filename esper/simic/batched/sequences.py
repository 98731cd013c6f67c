"""Sequences of many nets at once: the blueprints of `esper.kasmina.blueprints.sequence` and the GPT host.

Each linear map is one batched product with a matrix for every lane, and the lanes of an attention are more samples; so
no number of one net reaches another.

Shapes: L lanes (nets in one forward), B samples, T positions, C channels. Features are [L, B, T, C]; a weight has the
lanes in front of its own axes.
"""

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.hosts.gpt import GPT, Block

W = Mapping[str, Tensor]
LANES = 0  # axis of the lanes
HEADS = 4  # that a seed's attention asks for
EPS = 1e-5  # of torch's norms


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[L, B, T, O] of [L, B, T, C], weight [L, O, C] and bias [L, O]."""
    flat = x.flatten(1, 2)
    out = torch.bmm(flat, weight.mT) if bias is None else torch.baddbmm(bias[:, None], flat, weight.mT)
    return out.unflatten(1, x.shape[1:3])


def norm(x: Tensor, w: W, name: str) -> Tensor:
    """Layer norm at each position."""
    normal = F.layer_norm(x, x.shape[-1:], eps=EPS)
    return normal * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]


def _linear(x: Tensor, w: W, name: str) -> Tensor:
    return linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def attend(x: Tensor, w: W, name: str, heads: int) -> Tensor:
    """Causal attention by the weight ``name`` of queries, keys and values, before its output projection."""
    lanes = len(x)
    qkv = _linear(x, w, name).flatten(0, 1).unflatten(-1, (3, heads, -1))
    q_SHTD, k_SHTD, v_SHTD = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # S = L * B
    mixed_SHTD = F.scaled_dot_product_attention(q_SHTD, k_SHTD, v_SHTD, is_causal=True)
    return mixed_SHTD.transpose(1, 2).flatten(-2).unflatten(0, (lanes, -1))


def _scale(x: Tensor, w: W) -> Tensor:
    return x * w["scale.gamma"][:, None, None]


def _noop(x: Tensor, w: W) -> Tensor:
    return torch.zeros_like(x)


def _norm(x: Tensor, w: W) -> Tensor:
    return _scale(norm(x, w, "norm"), w)


def _lora(x: Tensor, w: W) -> Tensor:
    return _scale(_linear(_linear(x, w, "down"), w, "up"), w)


def _mlp(x: Tensor, w: W) -> Tensor:
    return _scale(_linear(F.gelu(_linear(norm(x, w, "norm"), w, "up")), w, "down"), w)


def _attention(x: Tensor, w: W) -> Tensor:
    mixed = attend(norm(x, w, "norm"), w, "qkv", math.gcd(HEADS, x.shape[-1]))
    return _scale(_linear(mixed, w, "project"), w)


DELTAS: dict[str, Callable[[Tensor, W], Tensor]] = {
    "noop": _noop,
    "norm": _norm,
    "lora": _lora,
    "lora_large": _lora,
    "mlp_small": _mlp,
    "mlp": _mlp,
    "attention": _attention,
    "flex_attention": _attention,
}


def gate(x: Tensor, w: W) -> Tensor:
    """g of `esper.kasmina.slots.gating.BlendGate`, [L, B, T, 1]."""
    count = torch.arange(1, x.shape[2] + 1, device=x.device, dtype=x.dtype)
    pooled = x.cumsum(2) / count[:, None]
    return torch.sigmoid(_linear(torch.tanh(_linear(pooled, w, "inner")), w, "outer"))


class ManyGPTs:
    """The forward of `esper.kasmina.hosts.gpt.GPT` for many nets of one shape.

    Args:
        model: one of them.
    """

    lanes_axis, deltas, gate = LANES, DELTAS, staticmethod(gate)

    def __init__(self, model: GPT) -> None:
        self.layers, first = len(model.blocks), model.blocks[0]
        assert isinstance(first, Block)
        self.heads = first.heads
        self.head = "tokens.weight" if model.head.weight is model.tokens.weight else "head.weight"
        self.key = (self.heads, self.head)

    def arrange(self, x: Tensor, lanes: int) -> Tensor:
        """Tokens [L, B, T] of the gathered samples, given [B * L, T], in which the lanes change fastest."""
        return x.unflatten(0, (-1, lanes)).transpose(0, 1)

    def __call__(self, tokens_LBT: Tensor, w: W, join: Callable[[str, Tensor], Tensor]) -> Tensor:
        """Logits [L, B, T, V].

        Args:
            tokens_LBT: int64.
            w: weights by the host's own names.
            join: called with each module's name and its output; returns the output with the seeds there.
        """
        table_LVC, length = w["tokens.weight"], tokens_LBT.shape[2]
        first = torch.arange(len(table_LVC), device=tokens_LBT.device) * table_LVC.shape[1]
        x = F.embedding(tokens_LBT + first[:, None, None], table_LVC.flatten(0, 1))
        x = x + w["positions.weight"][:, None, :length]
        for row in range(self.layers):
            name = f"blocks.{row}"
            mixed = attend(norm(x, w, f"{name}.norm1"), w, f"{name}.qkv", self.heads)
            x = x + join(f"{name}.project", _linear(mixed, w, f"{name}.project"))
            wide = F.gelu(_linear(norm(x, w, f"{name}.norm2"), w, f"{name}.up"))
            x = join(name, x + join(f"{name}.down", _linear(wide, w, f"{name}.down")))
        return linear(norm(x, w, "norm"), w[self.head])
