"""Regions: parts of a network that torch.compile compiles whole, while slots and growth stay outside of them.

A region compiles one method of one module (a block's ``forward``, a slot's `join`) and is called in its place; hooks
run around it, eagerly. So a seed that is planted, blended or pruned touches no region but its own, and keys, copies,
pickles and `functional_call` see an ordinary module.

Every region has its own code object. Per code object, dynamo keeps compiled graphs, counts recompiles and remembers
shapes, so regions neither share a limit nor push each other out, in any version of torch, and the graphs of a pruned
seed are freed with it. (``isolate_recompiles`` of torch 2.13 separates the first two, under one cap for all, and frees
nothing.)

A region runs one of three graphs, whatever flags its tensors happen to carry:

    LEARN     gradients to its parameters          a step of training
    THROUGH   parameters frozen, gradient to x     the shadow forward behind the seed, a prune ramp, a frozen fossil
    MEASURE   no gradient                          evaluation, probes, the shadow forward before the seed

and a fourth where train() and eval() differ. The batch is a dynamic axis; a batch of one sample is a graph of its own
(torch specialises on 1), and on CPU torch picks another convolution from 16 samples on.
"""

import builtins
import inspect
import itertools
import types
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

RECOMPILE_LIMIT = 64
Backend = str | Callable[..., Any]

_numbers = itertools.count()


def _call(method: Callable[..., Any], owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return method(owner, *args, **kwargs)


def _copy_call(name: str) -> Callable[..., Any]:
    """Copies `_call` with its own code object and its own globals, where dynamo puts what it compiles."""
    code = _call.__code__.replace(co_name=f"region_{next(_numbers)}")
    return types.FunctionType(code, {"__name__": __name__, "__builtins__": builtins}, name)


def compile_failures() -> tuple[type[Exception], ...]:
    """Returns what torch.compile raises when it cannot compile, or has reached its recompile limit."""
    from torch._dynamo import exc  # imported here: it takes two seconds, which only a run that compiles should pay

    return exc.TorchDynamoException, exc.FailOnRecompileLimitHit


def reason(error: Exception) -> str:
    """Describes a failed compile in one line: the error's type and the first two lines of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:300]


def _comes_from_warning(error: BaseException | None) -> bool:
    """Whether a warning made an error caused this one.

    Dynamo looks at more attributes than the code does; a warning that it meets on the way must not fail a compile.
    """
    while error is not None:
        if isinstance(error, Warning):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass(slots=True)
class _Count:
    graphs: int = 0


class Region:
    """A compiled method of a module; called like the bound method that it stands for.

    A compile that fails at run time, or a recompile beyond ``limit``, leaves the region uncompiled for good: `failure`
    then says why. Under a user's own torch.compile it is the plain method.

    Args:
        owner: the module.
        method: name of a method of its class.
        backend: backend of torch.compile.
        limit: most graphs that it may compile.

    Attributes:
        failure: why it runs eagerly, None while it runs compiled.
        strict: a failed compile raises, as it should before training.
    """

    def __init__(self, owner: nn.Module, method: str, backend: Backend, limit: int = RECOMPILE_LIMIT) -> None:
        self.owner, self.method, self.backend, self.limit = owner, method, backend, limit
        self._count = _Count()
        self.failure: str | None = None
        self.strict = False
        self._children: tuple[Any, ...] | None = None
        self._cached: list[tuple[dict[str, Any], str]] = []
        self._compiled: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"owner": self.owner, "method": self.method, "backend": self.backend, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # a copy compiles for itself

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the method returns.

        Raises:
            TorchDynamoException, FailOnRecompileLimitHit: it cannot be compiled, and `strict` is set.
        """
        owner, method = self.owner, getattr(type(self.owner), self.method)
        if self.failure is not None or torch.compiler.is_compiling():
            return method(owner, *args, **kwargs)
        if self._compiled is None:
            self._compiled = self._compile()
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            if tensor.ndim and tensor.shape[0] > 1:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        try:
            try:
                return self._run(method, args, kwargs, tensors)
            except compile_failures() as error:
                if not _comes_from_warning(error):
                    raise
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return self._run(method, args, kwargs, tensors)
        except compile_failures() as error:
            if self.strict:
                raise
            failure = reason(error)
        result = method(owner, *args, **kwargs)  # if the method itself is wrong it raises here: not a failed compile
        self.failure = failure
        return result

    def _run(self, method: Callable[..., Any], args: Any, kwargs: Any, tensors: list[torch.Tensor]) -> Any:
        assert self._compiled is not None
        grad = torch.is_grad_enabled()
        if grad and any(place[key].requires_grad for place, key in self._parameter_places()):
            return self._compiled(method, self.owner, args, kwargs)
        wanting = any(tensor.requires_grad for tensor in tensors)
        if wanting and not grad:
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs))
        with self._frozen(), torch.set_grad_enabled(grad and wanting):
            return self._compiled(method, self.owner, args, kwargs)

    @property
    def graphs(self) -> int:
        """Number of graphs compiled so far."""
        return self._count.graphs

    def _compile(self) -> Callable[..., Any]:
        inner = self.backend
        if isinstance(inner, str):
            from torch._dynamo.backends.registry import lookup_backend

            inner = lookup_backend(inner)

        count = self._count  # not self: dynamo keeps every backend that it was given

        def compile_and_count(graph: Any, inputs: Any, **options: Any) -> Any:
            count.graphs += 1
            return inner(graph, inputs, **options)

        accepted = inspect.signature(torch.compile).parameters
        options: dict[str, Any] = {"recompile_limit": self.limit} if "recompile_limit" in accepted else {}
        if not options:
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, self.limit)
        return torch.compile(_copy_call(self.method), backend=compile_and_count, fullgraph=True, **options)

    def _parameter_places(self) -> list[tuple[dict[str, Any], str]]:
        """Returns where the parameters are stored; looks again when the owner's children have changed."""
        children = tuple(self.owner._modules.values())
        if self._children is None or any(a is not b for a, b in itertools.zip_longest(children, self._children)):
            modules = list(self.owner.modules())
            self._cached = [(m._parameters, key) for m in modules for key, p in m._parameters.items() if p is not None]
            self._children = children
        return self._cached

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """Within the block no parameter needs a gradient: a twin on the same memory replaces each one that does."""
        held = [(place, key, place[key]) for place, key in self._parameter_places() if place[key].requires_grad]
        twins = {id(p): nn.Parameter(p.detach(), requires_grad=False) for _, _, p in held}
        for place, key, parameter in held:
            place[key] = twins[id(parameter)]
        try:
            yield
        finally:
            for place, key, parameter in held:
                place[key] = parameter


def region_of(module: nn.Module) -> Region | None:
    """Returns the region that runs in place of the module's forward; None if there is none."""
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, Region) else None


def strip(model: nn.Module) -> nn.Module:
    """Takes all regions off a model, in place, and returns it: plain modules and slots, as before."""
    for module in model.modules():
        if region_of(module) is not None:
            del module.__dict__["forward"]
        if isinstance(module.__dict__.get("region"), Region):
            module.__dict__["region"] = None
    return model


def choose_regions(model: nn.Module, sites: Collection[str], fired: Collection[str]) -> dict[str, nn.Module]:
    """Returns the largest submodules that can be compiled whole: they ran, and have no site strictly inside.

    A leaf of torch.nn is left alone, since it is one kernel already; so is the root, which holds the slots.

    Args:
        model: the host.
        sites: names of hooked modules.
        fired: names of modules that ran as modules in a forward.
    """
    chosen: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            leaf = type(child).__module__.startswith("torch.nn.") and not any(True for _ in child.children())
            if leaf or any(child is other for other in chosen.values()):
                continue
            if path in fired and not any(site.startswith(f"{path}.") for site in sites):
                chosen[path] = child
            else:
                walk(child, f"{path}.")

    walk(model, "")
    return chosen
