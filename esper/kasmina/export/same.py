"""Checks that two models compute the same: runs both on one example, in one way, and compares their outputs."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from esper.kasmina.axes.feature import tensors_in
from esper.kasmina.slots.sites import arguments
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError, ExportError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword inputs of a call."""
# Largest difference, over the largest magnitude of the output, that folding may make.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def inputs_for(model: nn.Module, example: Any) -> Inputs:
    """Copies the example to the model's device, floats in the dtype of its parameters."""
    like = next((p for p in model.parameters() if p.is_floating_point()), None)

    def follow(x: Tensor) -> Tensor:
        if like is None:
            return x.detach().clone()
        x = x.detach().clone(memory_format=torch.preserve_format)
        return x.to(like.device, like.dtype if x.is_floating_point() else None)

    args, kwargs = tree_map_only(Tensor, follow, arguments(example))
    return tuple(args), dict(kwargs)


@contextlib.contextmanager
def _plain_math(model: nn.Module) -> Iterator[None]:
    """Within the block no encoder layer is fused and the random streams are fixed; afterwards all is as before."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with undisturbed(model, seed=0):
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def run_plain(model: nn.Module, example: Inputs) -> Any:
    """Runs the model on a copy of the example, in the present grad mode."""
    args, kwargs = copy.deepcopy(example)
    with _plain_math(model):
        return model(*args, **kwargs)


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same bits in one dtype and shape."""
    if x.dtype is not y.dtype or x.shape != y.shape:
        return False
    one, two = (tensor.detach().reshape(-1).view(torch.uint8) for tensor in (x, y))
    return torch.equal(one, two)


def check_same(before: Any, after: Any, *, exact: bool) -> None:
    """Compares the outputs of two models.

    Raises:
        ExportError: they differ in a bit; or if not ``exact``, by more than `TOLERANCES`.
        ConfigError: the outputs hold no tensor.
    """
    pairs = list(zip(tensors_in(before), tensors_in(after), strict=True))
    if not pairs:
        raise ConfigError("the model's output on the example holds no tensor, so that nothing can be checked")
    for index, (x, y) in enumerate(pairs):
        if x.dtype is not y.dtype or x.shape != y.shape:
            raise ExportError(f"output {index} was {x.dtype} {tuple(x.shape)}, exported {y.dtype} {tuple(y.shape)}")
        if same_bits(x, y):
            continue
        distance = float((x.detach().double() - y.detach().double()).abs().max())
        if exact or not x.is_floating_point():
            raise ExportError(f"output {index} of the exported model has other bits, up to {distance:.3g} off")
        scale = float(x.detach().double().abs().max()) or 1.0
        if not distance <= TOLERANCES[x.dtype] * scale:
            raise ExportError(
                f"export moved output {index} by {distance / scale:.3g} of its largest magnitude, more than "
                f"{TOLERANCES[x.dtype]:.0e} for {x.dtype}; if seeds were folded, export with fold=False"
            )
