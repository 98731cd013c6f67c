"""Causal attention by FlexAttention (Dong et al. 2024) where it runs, else by SDPA. Chosen when a seed is built.

FlexAttention computes scaled dot-product attention under a *block mask*: blocks of positions that no query may see are
never computed. Where it runs depends on device, dtype and torch: on CPU (torch 2.9 to 2.13) it only has a forward and
refuses tensors that need a gradient, so nothing could be trained with it. So it is tried once per device type and
dtype, by running forward and backward of a tiny problem and comparing with SDPA. The answer is part of
`describe_registry`, on which all ranks agree at start; a seed never changes its implementation while it runs. Both have
the same weights under the same names.

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
    """Causal block masks by (length, device); keeps the ``limit`` used last.

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
        """Returns the mask of ``length`` positions; inside a compiled region it becomes part of the graph instead."""
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
    """Returns the next power of two, at least `MIN_WIDTH`."""
    return max(MIN_WIDTH, 1 << (dim - 1).bit_length())


def flex_causal(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor) -> Tensor:
    """Computes causal attention, [B, H, T, D] in and out: `scaled_dot_product_attention(q, k, v, is_causal=True)`.

    Heads of a width that the kernel does not take are padded with zeros, which changes no score.
    """
    dim = q_BHTD.shape[-1]
    q_BHTW, k_BHTW, v_BHTW = (pad(t, (0, _width(dim) - dim)) for t in (q_BHTD, k_BHTD, v_BHTD))
    mask = MASKS.get(q_BHTD.shape[-2], q_BHTD.device)
    compute: Any = flex_attention if torch.compiler.is_compiling() else _kernel()
    mixed_BHTW: Tensor = compute(q_BHTW, k_BHTW, v_BHTW, block_mask=mask, scale=dim**-0.5)
    return mixed_BHTW[..., :dim]


@functools.cache
def _probe_backend(device: str, dtype: torch.dtype) -> Backend:
    """Tries FlexAttention on one kind of device; see `attention_backend`."""
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randn(1, 2, 24, MIN_WIDTH, generator=generator).to(device, dtype) for _ in range(3)]

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in samples]
        output = attend(*inputs)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that it is slow uncompiled
            run(flex_attention)  # if it refuses, it does so here, before anything is compiled
        ours, theirs = run(flex_causal), run(functools.partial(scaled_dot_product_attention, is_causal=True))
    except Exception as error:  # any error means that FlexAttention cannot train on this device
        return Backend(SDPA, one_line(error, 160))
    apart = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    if not apart < 0.05:
        return Backend(SDPA, f"FlexAttention differs from SDPA by {apart:.2g} here")
    return Backend(FLEX)


def attention_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Chooses how a ``flex_attention`` seed attends: `FLEX` where it runs forward and backward, else `SDPA`.

    The first call takes some seconds on a device that compiles, and none on CPU.
    """
    if device.type == "meta":
        return Backend(SDPA, "meta tensors have no kernels")
    return _probe_backend(device.type, dtype)
