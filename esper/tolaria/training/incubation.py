"""The loss of a step: the host's, plus one shadow loss per seed that learns in a forward of its own.

Every shadow sees the same samples and the same random numbers as the host's forward. Afterwards the random stream is
where the host's forward left it, so the host's run is bitwise the same as without seeds.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import cuda_devices, read_streams, set_streams

Call = Callable[..., Any]  # stands for the model: takes its inputs, returns its output


def with_shadows(
    host: Callable[[], Tensor],
    shadow: Callable[[Call], Tensor],
    grown: Grown,
    slots: Sequence[str],
    device: torch.device,
) -> Tensor:
    """Sum of the host's loss and of one shadow loss per slot; 0-D, with a graph for backward.

    Args:
        host: computes the loss of the host's own forward.
        shadow: computes the loss with the given call in place of the model.
        grown: model and slots.
        slots: those whose seed learns in a forward of its own, row-major.
        device: its random numbers are replayed, and the CPU's.
    """
    if not slots:
        return _with_graph(host(), grown)
    devices = cuda_devices(device)
    before = read_streams(devices)
    total = host()
    after = read_streams(devices)
    for slot in slots:
        set_streams(before, devices)
        total = total + grown.shadow_loss(slot, shadow)
    set_streams(after, devices)
    return _with_graph(total, grown)


def _with_graph(total: Tensor, grown: Grown) -> Tensor:
    """Gives a loss on which nothing that learns depends a backward that does nothing, where nothing is to learn: a host
    that is frozen whole, before its first seed learns."""
    if total.requires_grad or not torch.is_grad_enabled():
        return total
    if any(parameter.requires_grad for parameter in grown.model.parameters()):
        return total  # a fault: the model's output does not reach the loss, which backward will say
    return total + torch.zeros((), device=total.device, requires_grad=True)
