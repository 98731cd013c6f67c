"""Causal attention by FlexAttention (Dong et al. 2024), where it runs; elsewhere by SDPA. Chosen when a seed is built.

FlexAttention computes scaled dot-product attention under a *block mask*: blocks of positions that no query may see are
never computed. What it needs differs by device, dtype and torch: on CPU (torch 2.9 to 2.13) it has a forward alone and
refuses tensors that need a gradient, so nothing could be trained with it. So it is asked once per device type and
dtype, by running forward and backward of a tiny problem and comparing with SDPA. The answer is part of the registry's
words, on which all ranks agree at start; a seed never changes its mind while it runs. Both paths have the same weights
under the same names.

Only the compiled kernel is used: uncompiled, FlexAttention writes out all T x T scores and gains nothing over SDPA.
"""

import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import pad, scaled_dot_product_attention

from esper.kasmina.blueprints.entry import Backend
from esper.leyline.errors import one_line

SDPA, FLEX = "sdpa", "flex"
MIN_WIDTH = 16  # of a head; the kernel's tiles are powers of two from here


def _causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


class BlockMasks:
    """Causal block masks by (length, device): the newest ``limit`` are kept, the one longest unused goes first.

    Fields:
        built: masks built so far.
    """

    def __init__(self, limit: int = 16) -> None:
        self.limit, self.built = limit, 0
        self._masks: OrderedDict[tuple[int, torch.device], BlockMask] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._masks)

    def get(self, length: int, device: torch.device) -> BlockMask:
        """The mask of ``length`` positions; inside a compiled region it becomes part of the graph instead."""
        if torch.compiler.is_compiling():
            return self._build(length, device)
        with self._lock:
            mask = self._masks.get((length, device))
            if mask is None:
                mask = self._build(length, device)
                self.built += 1
                self._masks[length, device] = mask
                if len(self._masks) > self.limit:
                    self._masks.popitem(last=False)
            self._masks.move_to_end((length, device))
            return mask

    @staticmethod
    def _build(length: int, device: torch.device) -> BlockMask:
        return create_block_mask(_causal, None, None, length, length, device=device)


MASKS = BlockMasks()


@functools.cache
def _kernel() -> Callable[..., Any]:
    return torch.compile(flex_attention, fullgraph=True)


def _width(dim: int) -> int:
    """The next power of two, at least `MIN_WIDTH`."""
    return max(MIN_WIDTH, 1 << (dim - 1).bit_length())


def flex_causal(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """Causal attention, [B, H, T, D] in and out: `scaled_dot_product_attention(q, k, v, is_causal=True)`.

    Heads of a width that the kernel does not take are padded with zeros, which changes no score.
    """
    dim = q_BHTD.shape[-1]
    q_BHTW, k_BHTW, v_BHTW = (pad(t, (0, _width(dim) - dim)) for t in (q_BHTD, k_BHTD, v_BHTD))
    mask = MASKS.get(q_BHTD.shape[-2], q_BHTD.device)
    compute: Any = flex_attention if torch.compiler.is_compiling() else _kernel()
    mixed_BHTW: Tensor = compute(q_BHTW, k_BHTW, v_BHTW, block_mask=mask, scale=dim**-0.5)
    return mixed_BHTW[..., :dim]


@functools.cache
def _probed(device: str, dtype: torch.dtype) -> Backend:
    """What runs on one kind of device; see `attention_backend`."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(1, 2, 24, MIN_WIDTH, generator=generator).to(device, dtype) for _ in range(3)]

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in drawn]
        output = attend(*inputs)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is slow uncompiled is known
            run(flex_attention)  # where it refuses, it does so here, before anything is compiled
        ours, theirs = run(flex_causal), run(functools.partial(scaled_dot_product_attention, is_causal=True))
    except Exception as error:  # whatever it is, it says that this device has no FlexAttention to train with
        return Backend(SDPA, one_line(error, 160))
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    if not apart < 0.05:
        return Backend(SDPA, f"FlexAttention differs from SDPA by {apart:.2g} here")
    return Backend(FLEX)


def attention_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """How a ``flex_attention`` seed for this device and dtype attends: `FLEX` where it runs forward and backward.

    The first question on a device that compiles takes some seconds, on CPU none.
    """
    if device.type == "meta":
        return Backend(SDPA, "meta tensors have no kernels")
    return _probed(device.type, dtype)
