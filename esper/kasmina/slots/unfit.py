"""Models that cannot grow, refused by name before anything is changed, instead of by torch's own error much later.

attach                lazy modules that have not run, sharded or otherwise wrapped parameters, scripted sites
session and trainer   sparse gradients, extra state that is no plain data, and what has become of the model since
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from esper.leyline.errors import ConfigError


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def check_model(model: nn.Module) -> None:
    """Refuses a model whose tensors are not there yet, or are not plain tensors.

    Raises:
        ConfigError: it has uninitialised, sharded or wrapped tensors; the text names the first.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ConfigError(f"{name or 'the model'} is sharded (FullyShardedDataParallel): {_WHOLE}")
        if isinstance(module, nn.parallel.DistributedDataParallel | nn.DataParallel):
            kind = type(module).__name__
            raise ConfigError(f"{name or 'the model'} is a {kind}: attach to the model inside, before it is wrapped")
        inner = next((key for key in _WRAPPED if key in module._modules), None)
        if inner is not None and type(module).__module__.startswith("lightning"):
            raise ConfigError(
                f"{name or 'the model'} is a {type(module).__name__} of Lightning: attach to the model itself (its "
                f"attribute {inner}); a session takes the place of fabric.setup"
            )
    for name, tensor in _tensors(model):
        if is_lazy(tensor):
            raise ConfigError(
                f"{name} of the model is not initialised yet (a lazy module): run one forward first, model(example), "
                "before the optimizer is built and before attach"
            )
        if type(tensor).__name__ == "DTensor" or type(getattr(tensor, "data", tensor)).__name__ == "DTensor":
            raise ConfigError(f"{name} of the model is a DTensor (fully_shard, or a device mesh): {_WHOLE}")
        if is_traceable_wrapper_subclass(tensor):
            raise ConfigError(
                f"{name} of the model is a {type(tensor).__name__}, not a plain tensor: it cannot be compared over "
                "ranks and saved; attach to a model of plain tensors"
            )


_WRAPPED = ("_original_module", "_forward_module")
_WHOLE = "sharded hosts cannot grow, since every rank must hold the whole network; use DistributedDataParallel, or none"


def check_learning(model: nn.Module) -> None:
    """Refuses a model that a session or a run cannot train and save; for one with slots.

    Raises:
        ConfigError: see `check_model`; or a module makes sparse gradients, or has extra state that is no plain data.
    """
    check_model(model)
    for name, module in model.named_modules():
        sparse = isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
        if sparse and module.weight.requires_grad:
            raise ConfigError(
                f"module {name!r} ({type(module).__name__}) makes sparse gradients, which cannot be judged and "
                "clipped per owner; build it with sparse=False"
            )
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            misfit = find_misfit(module.get_extra_state())
            if misfit is not None:
                raise ConfigError(
                    f"module {name!r} ({type(module).__name__}): its get_extra_state() holds a {misfit}; only numbers, "
                    "text, tensors, and dicts and lists of these can be saved and compared over ranks"
                )


def find_misfit(value: Any) -> str | None:
    """The type of the first part of a tree that is no plain data and no tensor; None without one."""
    if isinstance(value, Mapping):
        parts = [*value, *value.values()]
    elif type(value) in (list, tuple):
        parts = list(value)
    else:
        plain = isinstance(value, Tensor) or value is None or type(value) in (bool, int, float, str)
        return None if plain else type(value).__name__
    return next((misfit for part in parts if (misfit := find_misfit(part)) is not None), None)


def check_sites(model: nn.Module, where: Mapping[str, str]) -> None:
    """Refuses modules that take no hooks.

    Args:
        model: the host.
        where: what an error calls each module, by the module's name.

    Raises:
        ConfigError: one is compiled by torch.jit.
    """
    for name, text in where.items():
        if isinstance(model.get_submodule(name), torch.jit.ScriptModule):
            raise ConfigError(
                f"{text} is a torch.jit.ScriptModule, which takes no hooks: choose a module around it, or attach "
                "before torch.jit"
            )


def write_out_expanded(model: nn.Module) -> None:
    """Gives parameters and buffers made by ``expand()`` memory of their own, in place: equal values, writable."""
    written: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._buffers, module._parameters):
            for name, tensor in tensors.items():
                if tensor is None or not _overlaps(tensor):
                    continue
                if isinstance(tensor, nn.Parameter):
                    tensor.data = tensor.detach().clone(memory_format=torch.contiguous_format)
                else:
                    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
                    module._buffers[name] = written.setdefault(id(tensor), copy)


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements share memory, so that torch refuses to write."""
    if tensor.layout is not torch.strided:
        return False
    return any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True))
