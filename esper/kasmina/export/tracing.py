"""Rewrites a module of esper as one of torch: traces it by torch.fx, so that it runs without esper's code.

Symbolic tracing (Reed et al. 2022, "torch.fx: Practical program capture and transformation for deep learning in
Python") records every call; submodules of torch stay submodules under their own names, so keys are kept. Twists:

1. A branch on a value is taken as the example takes it, and an assertion in the graph refuses an input that would take
   the other one: a wrong branch is never followed silently.
2. A seed that is joined to a submodule's output is traced there, right after the call.
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

# Classes that differ from torch's only in how they compute: the torch class replaces them; tensors and keys stay.
TWINS: dict[type[nn.Module], type[nn.Module]] = {GroupNorm: nn.GroupNorm}


def package_of(value: object) -> str:
    """Returns the name of the package that an object's class comes from."""
    return type(value).__module__.partition(".")[0]


def is_torch(module: nn.Module) -> bool:
    """Whether the module consists of torch's own classes."""
    return all(package_of(part) == "torch" for part in module.modules())


def use_twins(module: nn.Module) -> bool:
    """Makes every module compute by torch's own code, in place: see `TWINS`; SDPA replaces FlexAttention.

    Returns:
        Whether the bits of the result may change by it.
    """
    moved = False
    for part in module.modules():
        twin = TWINS.get(type(part))
        if twin is not None:
            part.__class__ = twin
        if isinstance(part, FlexAttention) and part.backend != SDPA:
            part.backend, moved = SDPA, True  # equal within tolerance; its block masks need esper's functions
    return moved


class GuardedTracer(fx.Tracer):
    """Traces one module; see the module's docstring.

    Args:
        args: example of the module's positional inputs.
        kwargs: example of its keyword inputs.
        joins: by submodule, the module that is joined to its output; called like a forward hook.
    """

    def __init__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], joins: Mapping[nn.Module, nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.args, self.kwargs, self.joins = args, kwargs, dict(joins or {})
        self._computing = False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """True for torch's own modules and graphs, which are called; any other module is traced into."""
        if any(m is join for join in self.joins.values()):
            return False
        container = isinstance(m, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        return isinstance(m, fx.GraphModule) or (package_of(m) == "torch" and not container)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Records the call, and then what is joined to its output."""
        if self._computing:
            return forward(*args, **kwargs)
        output = super().call_module(m, forward, args, kwargs)
        join = self.joins.get(m)
        return output if join is None else join(m, args, output)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Returns parameters as the graph names them."""
        return attr_val if self._computing else super().getattr(attr, attr_val, parameter_proxy_cache)

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Takes the branch that the example takes, and guards it by an assertion."""
        found = self._value(obj.node)
        value = found.item() if isinstance(found, torch.Tensor) else found
        # torch.export cannot compare a condition on a free size with False; it can negate it.
        holds = torch.sym_not(obj) if found is False else operator.eq(obj, value)
        asked = f"{getattr(obj.node.target, '__name__', obj.node.target)}{obj.node.args}"
        message = f"the model was exported with an input where {asked} is {value!r}; this one takes another branch"
        self.create_proxy("call_function", torch._assert, (holds, message), {})
        return bool(value)

    def _value(self, node: fx.Node) -> Any:
        """Computes a node's value on the example."""
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
    """Returns the module as a graph around its own torch submodules, parameters and buffers, which it shares.

    A dropout that is called as a function, or another branch on ``training``, is recorded as it is in eval().

    Args:
        module: the module; not changed, except for classes in `TWINS`.
        args: example of its positional inputs.
        kwargs: example of its keyword inputs.
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
            node.meta = {key: value for key, value in node.meta.items() if key == "is_wrapped"}  # no traced classes
        graph._tracer_cls = None  # else a pickle would name our tracer
        traced = fx.GraphModule(module, graph, class_name=type(module).__name__)
    except Exception as error:  # a user's forward may do anything with a proxy
        lines = str(error).strip().splitlines() or [""]
        raise ConfigError(
            f"{what} cannot be exported: torch.fx cannot trace {type(module).__name__} "
            f"({type(error).__name__}: {lines[0][:200]}); write its forward without branches on tensor values, "
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


def esper_modules(model: nn.Module) -> list[str]:
    """Returns the names of modules of esper's classes that lie in no other such module."""
    names: list[str] = []
    for name, module in model.named_modules():
        if package_of(module) == "esper" and not any(is_below(name, other) for other in names):
            names.append(name)
    return names


def is_below(name: str, other: str) -> bool:
    """Whether the module of this name lies strictly below the other."""
    return name != other and (not other or name.startswith(f"{other}."))
