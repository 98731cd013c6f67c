"""Seeds that mix positions of a sequence or a signal, and what the slot tells them of the call.

A seed sees only what its site returns. What else decides which positions may see which, the slot knows: whether the
host is causal there, which positions the call masked, and with a cache of keys and values what came before. A class
that lets one position see another subclasses `Mixing` and takes all of it as `Positions`; any other blueprint of
sequences and signals must look at one position at a time, which is checked when it registers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

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
        visible: makes of ones [Q, K] a bool mask that broadcasts over [B, 1, Q, K], or none: which of K positions each
            of the call's Q may see. It may have fewer than K: then the last ones. None: no mask.
        memory: where keys and values of earlier calls are; None where the call holds all positions.
    """

    causal: bool = True
    visible: Callable[[Tensor], Tensor | None] | None = None
    memory: Memory | None = None


CAUSAL = Positions()
FREE = Positions(causal=False)


class Mixing(nn.Module):
    """A seed that lets positions see others: its forward takes (x, positions).

    Attributes:
        remembers: it heeds ``positions.memory``; one that does not is refused in a call with a cache.
    """

    remembers: ClassVar[bool] = False

    def forward(self, x: Tensor, positions: Positions = CAUSAL) -> Tensor:
        """Returns a delta of the same shape as ``x``, [B, T, C] or [B, C, T]."""
        raise NotImplementedError


def attend(q_BHQD: Tensor, k_BHQD: Tensor, v_BHQD: Tensor, positions: Positions) -> Tensor:
    """Attention of the call's Q positions over those that each may see: in the call, and in the memory before it.

    A position that may see none, as padding, sees itself.
    """
    k, v = (k_BHQD, v_BHQD) if positions.memory is None else positions.memory.extend(k_BHQD, v_BHQD)
    queries, keys = q_BHQD.shape[-2], k.shape[-2]
    same = isinstance(keys, int) and keys == queries  # under torch.fx it cannot be told, and may change
    ones = None if same and positions.visible is None else q_BHQD.new_ones((queries, keys), dtype=torch.bool)
    given = None if ones is None or positions.visible is None else positions.visible(ones)
    if same and given is None:
        return scaled_dot_product_attention(q_BHQD, k, v, is_causal=positions.causal)
    assert ones is not None
    if given is not None:  # a host that looks back over a window keeps no more than that
        k, v, ones = (t[..., -given.shape[-1] :, :] for t in (k, v, ones.mT))
        ones = ones.mT
    now = ones.shape[-1] - queries  # key of the first query
    visible = ones.tril(now) if positions.causal else ones
    if given is not None:
        visible = visible & given | ones.tril(now).triu(now)
    return scaled_dot_product_attention(q_BHQD, k, v, attn_mask=visible)
