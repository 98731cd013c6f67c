"""Data parallel training around a growing model. The only file that knows `DistributedDataParallel`.

A parameter that joins after the wrap is never reduced, silently, so whatever changes which parameters get a gradient
makes a new wrapper. It costs no broadcast: replicas are equal by symmetric birth and by digest, and a broadcast would
hide a difference.
"""

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from esper.tolaria.ranks.world import World


def _buffers_keyword() -> dict[str, Any]:
    """torch 2.13 renamed DDP's ``broadcast_buffers``; the engine synchronises buffers itself, at ticks."""
    names = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False}


def wrap(model: nn.Module, world: World) -> Callable[..., Any]:
    """Wraps the model for data parallel training; returns it as it is when alone, or when nothing is to be reduced.

    Raises:
        LockstepError: a rank is lost.
    """
    if world.data is None or not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    with world.collective("re-wrap"):
        return DistributedDataParallel(
            model,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            process_group=world.data,
            init_sync=False,
            find_unused_parameters=world.find_unused,
            **_buffers_keyword(),
        )


def no_sync(call: Callable[..., Any]) -> contextlib.AbstractContextManager[None]:
    """Within the block gradients accumulate on this rank only.

    Args:
        call: from `wrap`.
    """
    return call.no_sync() if isinstance(call, DistributedDataParallel) else contextlib.nullcontext()
