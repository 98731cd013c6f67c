"""A module of ours rewritten as one of torch: traced by torch.fx, so that it needs none of our code to run.

Symbolic tracing (Reed et al. 2022, "torch.fx: Practical program capture and transformation for deep learning in
Python") records every call; submodules of torch stay submodules under their own names, so keys are kept. Twists:

1. A branch on a value is taken as the example takes it, and an assertion in the graph refuses an input that would take
   the other one: a wrong branch is never followed in silence.
2. What is joined to the output of a submodule (a seed) is traced in its place, behind the call.
"""

import copy
import operator
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from esper.kasmina.blueprints.flex import SDPA
from esper.kasmina.blueprints.parts import GroupNorm
from esper.kasmina.blueprints.sequence import FlexAttention
from esper.leyline.errors import ConfigError

# Classes that only differ from torch's in how they compute: the torch class takes over, tensors and keys as they are.
TWINS: dict[type[nn.Module], type[nn.Module]] = {GroupNorm: nn.GroupNorm}


def package_of(value: object) -> str:
    """Name of the package that an object's class comes from."""
    return type(value).__module__.partition(".")[0]


def is_torch(module: nn.Module) -> bool:
    """Whether the module is made of torch's own classes."""
    return all(package_of(part) == "torch" for part in module.modules())


def use_twins(module: nn.Module) -> bool:
    """Makes every module compute by torch's own code, in place: see `TWINS`; SDPA takes the place of FlexAttention.

    Returns:
        Whether the bits of what is computed may change by it.
    """
    moved = False
    for part in module.modules():
        twin = TWINS.get(type(part))
        if twin is not None:
            part.__class__ = twin
        if isinstance(part, FlexAttention) and part.backend != SDPA:
            part.backend, moved = SDPA, True  # equal within tolerance; its block masks are functions of ours
    return moved


class GuardedTracer(fx.Tracer):
    """Traces one module; see the module's docstring.

    Args:
        args, kwargs: an example of the module's inputs.
        joins: what is put on the output of a submodule, by that submodule; called as a forward hook is.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], joins: Mapping[nn.Module, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.args, self.kwargs, self.joins = args, kwargs, dict(joins or {})
        self._computing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Torch's own modules, graphs among them, are called; ours and those of others are looked into."""
        if any(m is join for join in self.joins.values()):
            return False
        container = isinstance(m, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        return isinstance(m, fx.GraphModule) or (package_of(m) == "torch" and not container)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call, and behind it what is joined to its output."""
        if self._computing:
            return forward(*args, **kwargs)
        output = super().call_module(m, forward, args, kwargs)
        join = self.joins.get(m)
        return output if join is None else join(m, args, output)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Parameters as the graph names them."""
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Takes the branch that the example takes, and guards it."""
        value = self._value(obj.node)
        value = value.item() if isinstance(value, torch.Tensor) else value
        asked = f"{getattr(obj.node.target, '__name__', obj.node.target)}{obj.node.args}"
        said = f"the model was exported with an input where {asked} is {value!r}; this one takes another branch"
        self.create_proxy("call_function", torch._assert, (operator.eq(obj, value), said), {})
        return bool(value)

    def _value(self, node: fx.Node) -> Any:
        """What a node computes on the example."""
        graph = fx.Graph()
        places: dict[fx.Node, fx.Node] = {}
        graph.graph_copy(self.graph, places)
        graph.output(places[node])
        graph.eliminate_dead_code()
        self._computing = True
        try:
            with torch.no_grad():
                return fx.GraphModule(self.root, graph)(*copy.deepcopy(self.args), **copy.deepcopy(dict(self.kwargs)))
        finally:
            self._computing = False


def as_graph(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] = types.MappingProxyType({}),
    *,
    what: str,
    joins: Mapping[nn.Module, nn.Module] | None = None,
) -> fx.GraphModule:
    """The module as a graph around its own torch submodules, parameters and buffers, which it shares.

    A dropout that is called as a function, or another branch on ``training``, is recorded as it is in eval().

    Args:
        module: not changed, but for classes in `TWINS`.
        args, kwargs: an example of its inputs.
        what: what an error calls it.
        joins: see `GuardedTracer`.

    Raises:
        ConfigError: it cannot be traced.
    """
    use_twins(module)
    flags = [(part, part.training) for part in module.modules()]
    tracer = GuardedTracer(args, kwargs, joins)
    try:
        module.eval()
        graph = tracer.trace(module)
        for node in graph.nodes:
            node.meta.clear()  # holds the classes of the modules that were traced
        graph._tracer_cls = None  # else a pickle would name our tracer
        traced = fx.GraphModule(module, graph, class_name=type(module).__name__)
    except Exception as error:  # whatever a forward of somebody else's does with a proxy
        said = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"{what} cannot be exported: torch.fx cannot trace {type(module).__name__} "
            f"({type(error).__name__}: {said[0][:200]}); write its forward without branches on tensor values, "
            "in-place item assignment and calls that only take tensors"
        ) from error
    finally:
        for part, training in flags:
            part.training = training
    hidden = {name for name, _ in module.named_buffers()} - set(module.state_dict())
    for name in hidden & {name for name, _ in traced.named_buffers()}:
        owner, _, last = name.rpartition(".")
        traced.get_submodule(owner)._non_persistent_buffers_set.add(last)
    return traced
