"""A host's float buffers: which ranks average at a tick, and which are a rank's own.

Running statistics of norm layers are averages over samples, so their average over ranks is right for all. Of no other
buffer is that known: the mean of two memory queues of normalised features is no queue of normalised features. So only
the buffers that the user names are averaged beside; any other may differ between ranks, which is told once.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from esper.kasmina.slots.sites import CONTAINER, list_some
from esper.leyline.errors import ConfigError
from esper.tolaria.ranks.world import World


def _float_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Float buffers of the host and of copies of its blocks, by name, in canonical order."""
    return {
        name: buffer
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point() and (not name.startswith(f"{CONTAINER}.") or ".seed." in name)
    }


def averaged_names(model: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """Names of the buffers that are averaged: running statistics of norm layers, and those that match a pattern."""
    norms = {
        f"{name}.{statistic}" if name else statistic
        for name, module in model.named_modules()
        if isinstance(module, _NormBase)
        for statistic in ("running_mean", "running_var")
    }
    wanted = [name for name in _float_buffers(model) if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return [name for name in _float_buffers(model) if name in norms or name in wanted]


def check_patterns(model: nn.Module, patterns: Sequence[str], setting: str) -> None:
    """Checks that each pattern matches a float buffer of the host.

    Raises:
        ConfigError: one matches none; the text names ``setting`` and lists the buffers.
    """
    names = list(_float_buffers(model))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"{setting}: {pattern!r} matches no float buffer of the host; it has {list_some(names) or 'none'}"
            )


def own_names(model: nn.Module, patterns: Sequence[str] = ()) -> list[str]:
    """Names of the host's saved float buffers that are not averaged, so that a rank may fill them by itself."""
    averaged, saved = set(averaged_names(model, patterns)), model.state_dict().keys()
    return [name for name in _float_buffers(model) if name not in averaged and name in saved]


def running_statistics(model: nn.Module, patterns: Sequence[str] = ()) -> list[Tensor]:
    """The buffers that are averaged over ranks, in canonical order."""
    buffers = _float_buffers(model)
    return [buffers[name] for name in averaged_names(model, patterns)]


def average_running_statistics(model: nn.Module, world: World, patterns: Sequence[str] = ()) -> None:
    """Replaces running statistics by their average over the data group; does nothing if the model has none.

    Args:
        model: the host.
        world: the ranks.
        patterns: names of further buffers, with * and ?.
    """
    buffers = [] if world.size == 1 else running_statistics(model, patterns)
    if not buffers:
        return
    flat = torch.cat([buffer.detach().reshape(-1).double() for buffer in buffers])
    world.all_reduce(flat, dist.ReduceOp.SUM, what="average of running statistics", on="data")
    flat /= world.size
    with torch.no_grad():
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))
