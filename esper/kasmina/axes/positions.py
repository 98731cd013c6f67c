"""Seeds that mix positions of a sequence or a signal, and what the slot tells them of the call.

A seed sees only what its site returns. What else decides which positions may see which, the slot knows: whether the
host is causal there, which positions the call masked, and with a cache of keys and values what came before. A class
that lets one position see another subclasses `Mixing` and takes all of it as `Positions`; any other blueprint of
sequences and signals must look at one position at a time, which is checked when it registers.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class Memory(Protocol):
    """Keys and values of the positions before this call, kept where the host keeps its own."""

    def extend(self, k_BHTD: Tensor, v_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        """Appends those of this call; returns all."""


@dataclass(frozen=True, slots=True, eq=False)
class Positions:
    """What a mixing seed is told of the call.

    Fields:
        causal: a position may see only itself and what is before it.
        visible: bool [B or 1, 1, Q or 1, K], which of K positions each of the call's Q may see; None: all of them.
        memory: where keys and values of earlier calls are; None where the call holds all positions.
    """

    causal: bool = True
    visible: Tensor | None = None
    memory: Memory | None = None


CAUSAL = Positions()
FREE = Positions(causal=False)


class Mixing(nn.Module):
    """A seed that lets positions see others: its forward takes (x, positions)."""

    def forward(self, x: Tensor, positions: Positions = CAUSAL) -> Tensor:
        """Returns a delta of the same shape as ``x``, [B, T, C] or [B, C, T]."""
        raise NotImplementedError


def attend(q_BHQD: Tensor, k_BHQD: Tensor, v_BHQD: Tensor, positions: Positions) -> Tensor:
    """Attention of the call's Q positions over those that each may see: in the call, and in the memory before it.

    A position that may see none, as padding, sees itself.
    """
    if positions.visible is None and positions.memory is None:
        return scaled_dot_product_attention(q_BHQD, k_BHQD, v_BHQD, is_causal=positions.causal)
    k_BHKD, v_BHKD = (k_BHQD, v_BHQD) if positions.memory is None else positions.memory.extend(k_BHQD, v_BHQD)
    if positions.visible is not None:  # a host that looks back over a window keeps no more than that
        k_BHKD, v_BHKD = (t[:, :, -positions.visible.shape[-1] :] for t in (k_BHKD, v_BHKD))
    queries, keys = q_BHQD.shape[-2], k_BHKD.shape[-2]
    at = torch.arange(keys - queries, keys, device=q_BHQD.device)[:, None]
    seen = torch.arange(keys, device=q_BHQD.device)
    visible = seen <= at if positions.causal else torch.ones_like(seen <= at)
    if positions.visible is not None:
        visible = visible & positions.visible | (seen == at)
    return scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=visible)
