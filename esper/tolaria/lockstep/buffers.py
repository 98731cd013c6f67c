"""Running statistics of BatchNorm hosts, averaged over the ranks."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper.kasmina.slots.sites import CONTAINER
from esper.tolaria.ranks.world import World


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Float buffers that each rank updates from its own samples (BatchNorm), in canonical order."""
    return [
        buffer
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and not name.startswith(CONTAINER)
    ]


def average_running_statistics(model: nn.Module, world: World) -> None:
    """Replaces running statistics by their average over the data group; does nothing if the model has none."""
    buffers = running_statistics(model)
    if world.size == 1 or not buffers:
        return
    flat = torch.cat([buffer.detach().reshape(-1).double() for buffer in buffers])
    world.all_reduce(flat, dist.ReduceOp.SUM, what="average of running statistics", on="data")
    flat /= world.size
    with torch.no_grad():
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))
