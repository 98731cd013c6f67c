"""Activation checkpointing of built-in hosts: a block's activations are computed again in the backward, not kept.

Chen et al. 2016, "Training deep nets with sublinear memory cost", arXiv:1604.06174. A block becomes an instance of a
subclass of its class, so names, keys and copies stay as they were, and eval() computes as ever. Slots inside a block
and behind it go with it (docs/models.md). BatchNorm normalises with the same batch in both forwards, and moves its
running statistics in the first alone.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from esper.leyline.errors import ConfigError

BLOCKS = ("blocks", "stages")  # where built-in hosts have them


_KNOWN: dict[type, Any] = {}  # the subclass of each class of blocks


@contextlib.contextmanager
def _statistics_stay(block: nn.Module) -> Iterator[None]:
    """Within the context the norms of a block have copies of their running statistics, which are lost with it."""
    kept = [(module, dict(module.named_buffers())) for module in block.modules() if isinstance(module, _BatchNorm)]
    for norm, buffers in kept:
        norm._buffers.update({name: buffer.clone() for name, buffer in buffers.items()})
    try:
        yield
    finally:
        for norm, buffers in kept:
            norm._buffers.update(buffers)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What a block's forward computes within, and what the second one does."""
    return contextlib.nullcontext(), _statistics_stay(block)


def _recomputed(kind: Any) -> Any:
    if kind in _KNOWN:
        return _KNOWN[kind]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            again = functools.partial(kind.forward, self)
            contexts = functools.partial(_contexts, self)
            return checkpoint(again, *args, use_reentrant=False, context_fn=contexts, **kwargs)
        return kind.forward(self, *args, **kwargs)

    _KNOWN[kind] = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return _KNOWN[kind]


def recompute_blocks(host: nn.Module, kind: str) -> None:
    """Lets the backward compute each block of a host again.

    Args:
        host: built in.
        kind: its registered name, for an error.

    Raises:
        ConfigError: it has no blocks.
    """
    blocks: list[nn.Module] = [block for name in BLOCKS for block in getattr(host, name, ())]
    if not blocks:
        raise ConfigError(
            f"trainer.recompute = true: is for the blocks of gpt, cnn and resnet20; host={kind} is asked to do so by "
            "its own code"
        )
    for block in blocks:
        block.__class__ = _recomputed(type(block))
