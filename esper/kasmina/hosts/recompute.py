"""Activation checkpointing of built-in hosts: a block's activations are computed again in the backward, not kept.

Chen et al. 2016, "Training deep nets with sublinear memory cost", arXiv:1604.06174. A block becomes an instance of a
subclass of its class, so names, keys and copies stay as they were, and eval() computes as ever. Slots inside a block
and behind it go with it (docs/models.md).
"""

import functools
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from esper.leyline.errors import ConfigError

BLOCKS = ("blocks", "stages")  # where built-in hosts have them


_KNOWN: dict[type, Any] = {}  # the subclass of each class of blocks


def _recomputed(kind: Any) -> Any:
    if kind in _KNOWN:
        return _KNOWN[kind]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            return checkpoint(functools.partial(kind.forward, self), *args, use_reentrant=False, **kwargs)
        return kind.forward(self, *args, **kwargs)

    _KNOWN[kind] = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    return _KNOWN[kind]


def recompute_blocks(host: nn.Module, kind: str) -> None:
    """Lets the backward compute each block of a host again.

    Args:
        host: built in.
        kind: its registered name, for an error.

    Raises:
        ConfigError: it has no blocks, or statistics that a second forward would move.
    """
    blocks: list[nn.Module] = [block for name in BLOCKS for block in getattr(host, name, ())]
    if not blocks:
        raise ConfigError(
            f"trainer.recompute = true: is for the blocks of gpt and cnn; host={kind} is asked to do so by its own code"
        )
    if any(isinstance(module, _BatchNorm) for module in host.modules()):
        raise ConfigError(
            f"trainer.recompute = true: host={kind} has BatchNorm, whose statistics a second forward would move again; "
            "set it to false"
        )
    for block in blocks:
        block.__class__ = _recomputed(type(block))
