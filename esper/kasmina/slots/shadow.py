"""The shadow forward: one seed at alpha 1, everything else frozen, and a backward that is run where the forward was.

Activation checkpointing runs parts of a forward again in backward, when whoever ran it has long returned. So not only
the forward of a shadow is run inside, with the frozen weights in the model and the seed at alpha 1, but its backward
too. Outside stands one node of autograd (`Inward`) whose backward goes in, runs the backward there, and comes out with
the gradients of the seed's parameters. Inside the seed has stand-ins for them, on the same memory, so that nothing
reaches a leaf of the model by itself, whichever form of checkpointing the host uses.

    reentrant form    its segments run without gradients and pass on gradients only if an input needs one. A seed inside
                      such a segment is reached if the host's stand-ins need gradients too, which nobody reads
    no_grad           a site that runs without gradients looks the same, and the seed is reached by nothing
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from esper.kasmina.axes.feature import replace_tensors, tensors_in
from esper.leyline.errors import ConfigError

Within = Callable[[Callable[[], Any]], Any]  # runs its argument in the surroundings of a forward


class Inward(torch.autograd.Function):
    """Forward: the values of tensors that were computed inside. Backward: that of those tensors, run inside."""

    @staticmethod
    def forward(ctx: Any, run: Within, inner: list[Tensor], stand_ins: list[Tensor], *own: Tensor) -> Any:
        """Returns ``inner`` without its graph.

        Args:
            ctx: of autograd.
            run: runs the backward in the surroundings of the forward.
            inner: with a graph down to the stand-ins.
            stand_ins: leaves, in the order of ``own``.
            own: the tensors that get the gradients.
        """
        ctx.run, ctx.inner, ctx.stand_ins = run, inner, stand_ins
        return tuple(tensor.detach() for tensor in inner)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        """Returns the gradients of ``own``."""
        if ctx.inner is None:
            raise ConfigError(
                "a second backward through the loss of a seed that incubates in a shadow forward: call backward once, "
                "or choose slots.incubation = ste or immediate"
            )
        given = [i for i, grad in enumerate(grads) if grad is not None]
        tensors, upstream = [ctx.inner[i] for i in given], [grads[i] for i in given]
        ctx.inner = None
        # Not torch.autograd.grad: the reentrant form of checkpointing only knows backward().
        ctx.run(lambda: torch.autograd.backward(tensors, upstream))
        found = [leaf.grad for leaf in ctx.stand_ins]
        ctx.run = ctx.stand_ins = None
        return None, None, None, *found


def freeze(
    model: nn.Module, prefix: str, *, tracked: bool
) -> tuple[dict[str, Tensor], dict[str, tuple[nn.Parameter, nn.Parameter]]]:
    """Returns what a shadow forward runs with instead of the model's own tensors.

    Args:
        model: the whole model.
        prefix: of the names of the slot whose seed learns.
        tracked: whether the host's stand-ins need gradients, which are thrown away.

    Returns:
        Tensors by name, all but the slot's own buffers; and by name the parameters that learn, with their stand-ins.
    """
    tensors: dict[str, Tensor] = {}
    learning: dict[str, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        mine = name.startswith(prefix)
        needs = parameter.requires_grad if mine else tracked and parameter.is_floating_point()
        # A Parameter, since a compiler tells types apart.
        tensors[name] = stand_in = nn.Parameter(parameter.detach(), requires_grad=needs)
        if mine and needs:
            learning[name] = parameter, stand_in
    tensors |= {name: buffer.clone() for name, buffer in model.named_buffers() if not name.startswith(prefix)}
    return tensors, learning


def come_out(result: Any, run: Within, learning: Mapping[str, tuple[nn.Parameter, nn.Parameter]]) -> Any:
    """Returns what was computed inside, its tensors with a graph to the learning parameters in place of theirs."""
    inner = [tensor for tensor in tensors_in(result) if tensor.requires_grad]
    if not inner or not learning:
        return result
    own, stand_ins = map(list, zip(*learning.values(), strict=True))
    outer = dict(zip(map(id, inner), Inward.apply(run, inner, stand_ins, *own), strict=True))
    return replace_tensors(result, lambda tensor: outer.get(id(tensor), tensor))
