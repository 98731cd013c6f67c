"""Seeds are kept in float32 at least, also in hosts of half precision.

A weight of 0.1 in bfloat16 has steps of 0.0005: an update of 0.0002 is rounded away, and the gradient looks healthy all
the while. So in a host of half precision seeds, their moments and their gates are float32 (Micikevicius et al. 2018,
"Mixed Precision Training", section 3.1). The feature is widened where it enters the seed, and the delta is rounded
once, where it is joined.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

HALF = (torch.bfloat16, torch.float16)


def seed_dtype(host: torch.dtype) -> torch.dtype:
    """Number format of seeds in a host of this one: float32, or float64 where the host has it."""
    return torch.promote_types(host, torch.float32)


def as_wide(x: Tensor, seed: nn.Module) -> Tensor:
    """The input of a seed: in half precision it is widened to the seed's format. Autocast sees to it by itself.

    Args:
        x: features.
        seed: its first parameter has its format.
    """
    if x.dtype not in HALF or torch.is_autocast_enabled(x.device.type):
        return x
    first = next(seed.parameters(), None)
    return x if first is None or first.dtype in HALF else x.to(first.dtype)


def keeping_wide(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Of a cast or a move (`nn.Module._apply`), the same where nothing wide becomes half."""

    def moved(tensor: Tensor) -> Tensor:
        made = fn(tensor)
        narrowed = made.dtype in HALF and tensor.is_floating_point() and tensor.dtype not in HALF
        return tensor.to(made.device) if narrowed else made

    return moved
