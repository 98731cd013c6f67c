"""Folding: linear seeds and scales become part of the weights beside them. A step of the export, never of training.

    at a Linear h = W x + b      h + f delta(h), delta(h) = A h + c        W' = (I + f A) W,  b' = (I + f A) b + f c
    f gamma M(x)                 M a Linear, Conv or affine norm           its weight and bias times f gamma, by channel
    delta = 0                    any site                                  the seed is left out

f is the factor of the join: alpha, or alpha times a vector by channel. Products are computed in float64 and rounded
once, so that the result differs from the unfolded model by rounding alone.
"""

import copy
import operator
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import Node

from esper.kasmina.axes.site import Site
from esper.kasmina.export.copying import is_from_esper
from esper.leyline.topology import Topology

_SCALABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)


def _constants(graph: fx.GraphModule) -> dict[Node, Tensor]:
    """Returns the nodes that depend on parameters and buffers alone, with their values."""
    constants: dict[Node, Tensor] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            constants[node] = getattr(graph.get_submodule(owner), name)
        elif node.op == "call_method" and node.target == "view" and node.args[0] in constants:
            constants[node] = constants[node.args[0]].view(*node.args[1:])
    return constants


def _is_binary(node: Node) -> bool:
    return node.op == "call_function" and node.target in (operator.mul, operator.add) and len(node.args) == 2


def is_zero(seed: nn.Module) -> bool:
    """Whether the seed's delta is zero for every input."""
    if not isinstance(seed, fx.GraphModule):
        return False
    returned = next(node.args[0] for node in seed.graph.nodes if node.op == "output")
    return isinstance(returned, Node) and returned.target is torch.zeros_like


def affine_map(seed: nn.Module, dim: int) -> tuple[Tensor, Tensor] | None:
    """Returns A [C, C] and c [C] in float64 with delta(h) = A h + c at each position; None if the seed is not affine.

    For features with C last. The graph must be a chain of Linear layers and of products and sums with 1-D parameters.
    """
    if type(seed) is nn.Linear:
        seed = fx.symbolic_trace(nn.Sequential(seed))
    if not isinstance(seed, fx.GraphModule):
        return None
    constants = _constants(seed)
    placeholders = [node for node in seed.graph.nodes if node.op == "placeholder"]
    if len(placeholders) != 1:
        return None
    chain: Node = placeholders[0]
    for node in seed.graph.nodes:
        if node in constants or node.op == "placeholder":
            continue
        if node.op == "output":
            if node.args[0] is not chain:
                return None
        elif node.op == "call_module" and type(seed.get_submodule(str(node.target))) is nn.Linear:
            if node.args != (chain,):
                return None
            chain = node
        elif _is_binary(node):
            others = [arg for arg in node.args if arg is not chain]
            fixed = all(isinstance(arg, Node) and arg in constants and constants[arg].ndim <= 1 for arg in others)
            if len(others) != 1 or not fixed:
                return None
            chain = node
        else:
            return None
    wide = copy.deepcopy(seed).to(dtype=torch.float64)
    device = next((p.device for p in seed.parameters()), torch.device("cpu"))
    probe = torch.cat([torch.zeros(1, dim), torch.eye(dim)]).to(device=device, dtype=torch.float64)
    with torch.no_grad():
        columns = wide(probe)
    return (columns[1:] - columns[0]).T, columns[0]


def tied_tensors(model: nn.Module) -> set[int]:
    """Returns the ids of the parameters that have more than one name in the model."""
    names = Counter([id(tensor) for _, tensor in model.named_parameters(remove_duplicate=False)])
    return {key for key, count in names.items() if count > 1}


def target_of(model: nn.Module, site: Site, tied: Collection[int] | None = None, *, hooked: bool = False) -> str | None:
    """Returns the name of the Linear that makes the feature at a site; None if weights cannot be folded into it.

    Args:
        model: the host.
        site: the place of a slot in it.
        tied: of `tied_tensors`; None to look for them.
        hooked: whether layers with hooks count, too.
    """
    if site.place is not None or site.layout[-1] != "C" or site.topology not in (Topology.SEQUENCE, Topology.VECTOR):
        return None
    return _last_linear(model, site.module, tied_tensors(model) if tied is None else tied, hooked)


def _last_linear(model: nn.Module, module: str, tied: Collection[int], hooked: bool) -> str | None:
    site = model.get_submodule(module)
    while type(site) is nn.Sequential and len(site) and (hooked or not _has_hooks(site)):
        last = list(dict(site.named_children()))[-1]
        module, site = f"{module}.{last}" if module else last, site.get_submodule(last)
    if type(site) is not nn.Linear or (not hooked and _has_hooks(site)):
        return None
    if any(id(tensor) in tied for tensor in (site.weight, site.bias) if tensor is not None):
        return None
    return module


def joined_before(site: Site, target: str, others: Collection[str]) -> bool:
    """Whether another seed is joined to the layer's output before the site's own.

    Args:
        site: the site.
        target: of `target_of`.
        others: modules of the sites of other seeds.
    """
    below = target.removeprefix(site.module).lstrip(".").split(".") if target != site.module else []
    path = [".".join([*filter(None, [site.module]), *below[:depth]]) for depth in range(1, len(below) + 1)]
    return any(name in others for name in path)


def _by_channel(factor: float | Tensor, device: torch.device) -> Tensor:
    """Returns the factor as float64 [1] or [C]."""
    return torch.as_tensor(factor, dtype=torch.float64, device=device).reshape(-1)


def _has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks of its author's or its user's."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(not is_from_esper(hook) for hooks in kinds for hook in hooks.values())


def fold_into(linear: nn.Linear, factor: float | Tensor, matrix: Tensor, offset: Tensor) -> bool:
    """Writes h -> h + factor (A h + c) into the layer that makes h; returns False if it has no bias to take c."""
    by_channel = _by_channel(factor, matrix.device)
    if linear.bias is None and bool(offset.any()):
        return False
    with torch.no_grad():
        total = torch.eye(len(matrix), dtype=torch.float64, device=matrix.device) + by_channel[:, None] * matrix
        linear.weight.copy_(total @ linear.weight.double())
        if linear.bias is not None:
            linear.bias.copy_(total @ linear.bias.double() + by_channel * offset)
    return True


def _find_scaled_call(seed: fx.GraphModule) -> tuple[Node, Node, Node] | None:
    """If the seed ends in module(x) * constant, with a scalable module: returns the product, the call, the constant."""
    returned: Any = next(node.args[0] for node in seed.graph.nodes if node.op == "output")
    if not (isinstance(returned, Node) and _is_binary(returned) and returned.target is operator.mul):
        return None
    constants = _constants(seed)
    calls = [a for a in returned.args if isinstance(a, Node) and a.op == "call_module"]
    fixed = [a for a in returned.args if isinstance(a, Node) and a in constants]
    if len(calls) != 1 or len(fixed) != 1 or len(calls[0].users) != 1 or len(returned.users) != 1:
        return None
    module: Any = seed.get_submodule(str(calls[0].target))
    once = sum(node.op == "call_module" and node.target == calls[0].target for node in seed.graph.nodes) == 1
    affine = type(module) in _SCALABLE and isinstance(module.weight, Tensor)
    if not (once and affine and module.weight.ndim == (1 if isinstance(module, nn.LayerNorm) else module.weight.ndim)):
        return None
    linear = isinstance(module, nn.Linear | nn.LayerNorm)
    shape = constants[fixed[0]].shape  # [C], or [C, 1, 1] where C is not the last axis
    fits = shape[0] == len(module.weight) == shape.numel() and (len(shape) == 1) == linear
    return (returned, calls[0], fixed[0]) if fits else None


def fold_scale(seed: nn.Module, factor: float | Tensor) -> str | None:
    """Multiplies a final scale and ``factor`` into the layer before it, in place, and takes the scale out of the graph.

    Returns:
        Name of the layer that took them; None if the seed does not end in such a product (nothing is changed).
    """
    if not isinstance(seed, fx.GraphModule):
        return None
    nodes = _find_scaled_call(seed)
    if nodes is None:
        return None
    product, call, fixed = nodes
    module: Any = seed.get_submodule(str(call.target))
    tied = tied_tensors(seed)
    if _has_hooks(module) or any(id(tensor) in tied for tensor in (module.weight, module.bias) if tensor is not None):
        return None
    scale = _constants(seed)[fixed].detach().double().reshape(-1)
    scale = scale * _by_channel(factor, scale.device)
    with torch.no_grad():
        module.weight.copy_(module.weight.double() * scale.view(-1, *[1] * (module.weight.ndim - 1)))
        if module.bias is not None:
            module.bias.copy_(module.bias.double() * scale)
    product.replace_all_uses_with(call)
    seed.graph.erase_node(product)
    idle: Any = fixed
    while isinstance(idle, Node) and not idle.users:
        before = idle.args[0] if idle.args else None
        seed.graph.erase_node(idle)
        idle = before
    seed.delete_all_unused_submodules()
    seed.recompile()
    return str(call.target)
