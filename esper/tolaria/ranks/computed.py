"""What a module computes, in digests that ranks compare: equal weights do not show that the code behind them is equal.

Two passes in train() and two in eval(), on inputs and random streams that are the same on every rank, give the bits of
the output and those of the gradient of a fixed scalar: the sum of all float outputs, each number times a fixed weight.
A tensor that does not equal itself in two passes (an operation of a GPU without a deterministic form, a generator of
the user's own) is compared within the difference that it shows on some rank.

Afterwards buffers, gradients, training flags and random streams are bitwise as they were.
"""

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from esper.kasmina.lending import call_with, stand_ins
from esper.kasmina.slots.sites import is_compiled
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import one_line
from esper.tolaria.ranks.digest import digest_tensors
from esper.tolaria.ranks.world import World

SEED = 20_011  # of the streams in a pass, and of the scalar's weights
REPEATS = 4  # further passes of what does not equal itself
SLACK = 8.0  # times the largest difference of a rank from itself
CHUNK = 2**20  # numbers that travel at once
MODES = ("train", "eval")

Named = dict[str, Tensor]


def leaves_of(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor | None]]:
    """Yields the tensors in what a call returned, by their place; of anything else only place, type and plain value."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from leaves_of(entry, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from leaves_of(entry, f"{name}[{index}]")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves_of(getattr(value, field.name), f"{name}.{field.name}")
    elif isinstance(value, float):
        yield name, torch.tensor([value], dtype=torch.float64)
    elif value is None or isinstance(value, bool | int | str):
        yield f"{name} = {value!r}", None
    else:
        yield f"{name} of type {type(value).__name__}", None


def _plain(tensor: Tensor) -> Tensor:
    """The tensor's numbers as a strided, real tensor."""
    tensor = tensor.detach()
    if tensor.is_nested:
        tensor = tensor.values()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def fixed_scalar(leaves: Named) -> Tensor | None:
    """The scalar whose gradient is compared; None if no leaf has a gradient."""
    generator = torch.Generator().manual_seed(SEED)
    terms = []
    for leaf in leaves.values():
        if not leaf.requires_grad:
            continue
        if leaf.is_nested:
            leaf = leaf.values()
        leaf = torch.view_as_real(leaf.resolve_conj()) if leaf.is_complex() else leaf
        dtype = torch.promote_types(leaf.dtype, torch.float32)
        weights = torch.randn(leaf.shape, generator=generator).to(leaf.device, dtype)
        terms.append((leaf.to(dtype) * weights).sum())
    return torch.stack([term.to(terms[0]) for term in terms]).sum() if terms else None


@contextlib.contextmanager
def reproducible(*devices: torch.device) -> Iterator[None]:
    """Within the block CUDA uses deterministic algorithms where it has them, and does not choose them by a race."""
    if all(device.type != "cuda" for device in devices):
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


@contextlib.contextmanager
def untouched(module: nn.Module) -> Iterator[None]:
    """After the block training flags and buffers are as before it, the objects and their bits."""
    flags = [(child, child.training) for child in module.modules()]
    kept = [
        (child, name, buffer, None if buffer is None else buffer.detach().clone())
        for child in module.modules()
        for name, buffer in child._buffers.items()
    ]
    try:
        yield
    finally:
        for child, training in flags:
            child.training = training
        with torch.no_grad():
            for child, name, buffer, copy in kept:
                child._buffers[name] = buffer
                if buffer is None or copy is None:
                    continue
                if buffer.shape != copy.shape:
                    buffer.data = copy
                elif not torch.equal(buffer, copy):
                    buffer.copy_(copy)


class Computation:
    """A call of a module that can be repeated.

    Args:
        module: holds parameters, buffers and flags.
        call: calls it on inputs that are the same at every call and on every rank, and returns what it returns.
        context: makes the surroundings of the call, such as autocast.
        modes: "train" and "eval", or one of them.

    Fields:
        error: what the latest run raised; None if nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Callable[[], Any],
        *,
        context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
        modes: Sequence[str] = MODES,
    ) -> None:
        self.module, self.call, self.context, self.modes = module, call, context, modes
        self.error: Exception | None = None

    def run(self, mode: str) -> Named:
        """Runs once; returns every tensor of the output, and the gradient of every parameter that gets one.

        What fails, or is no tensor, is an entry without numbers whose name says so.
        """
        learning = stand_ins(self.module)
        found: Named = {}
        self.error = None

        def compute() -> None:
            with self.context():
                leaves = dict(leaves_of(self.call()))
            floats = {name: leaf for name, leaf in leaves.items() if leaf is not None}
            found.update({name: torch.empty(0) if leaf is None else _plain(leaf) for name, leaf in leaves.items()})
            total = fixed_scalar(floats) if learning else None
            if total is not None:
                total.backward()

        with contextlib.ExitStack() as stack:
            stack.enter_context(untouched(self.module))
            stack.enter_context(undisturbed(self.module, seed=SEED))
            stack.enter_context(reproducible(*{tensor.device for tensor in self.module.parameters()}))
            if is_compiled(self.module):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(torch.enable_grad())
            self.module.train(mode == "train")
            try:
                call_with(self.module, learning, compute)
                grads = {name: leaf.grad for name, leaf in learning.items()}
                found |= {f"gradient of {name}": _plain(grad) for name, grad in grads.items() if grad is not None}
            except Exception as error:
                found |= {f"failed with {type(error).__name__}": torch.empty(0)}
                self.error = error.with_traceback(None)  # its frames hold tensors
        return found


def _digests(named: Named) -> dict[str, int]:
    return {name: digest_tensors([(name, tensor)]) for name, tensor in named.items()}


def digest_twice(computation: Computation, mode: str = "train") -> int | None:
    """62-bit digest of what one mode computes; None if it does not equal itself, so that it cannot be compared.

    Whatever the computation raises is passed on.
    """
    first, second = (_digests(computation.run(mode)) for _ in range(2))
    if computation.error is not None:
        raise computation.error
    return _fold(first) if first == second else None


def _fold(digests: Mapping[str, int]) -> int:
    return digest_tensors([("", torch.tensor([digest for _, digest in sorted(digests.items())], dtype=torch.int64))])


def describe_computed(world: World, computations: Mapping[str, Computation], *, on: str = "control") -> dict[str, str]:
    """Fields for the handshake that are equal on all ranks exactly if all compute the same; none when alone.

    It takes one all-reduce(MAX), and more only if something does not equal itself in two passes. Rank 0 then prints a
    line, as it does for what cannot be computed.

    Args:
        world: the ranks.
        computations: by the name that an error calls each, the same names on every rank.
        on: group of the collectives, as in `World.all_reduce`.
    """
    if world.size == 1 or not computations:
        return {}
    passes = [
        (f"{name} in {mode}()", computation, mode)
        for name, computation in computations.items()
        for mode in computation.modes
    ]
    digests, unsteady, failures, row = [], [], [], []
    for _, computation, mode in passes:
        named = computation.run(mode)
        failures.append("" if computation.error is None else one_line(computation.error))
        again = _digests(computation.run(mode))
        digests.append(_digests(named))
        unsteady.append([name for name, digest in digests[-1].items() if again.get(name) != digest])
        shapes = digest_tensors((name, torch.empty(0, dtype=t.dtype)) for name, t in named.items())
        layout = digest_tensors([(str(shapes), torch.tensor([d for t in named.values() for d in (t.ndim, *t.shape)]))])
        row += [layout, -layout, len(unsteady[-1])]
    agreed = world.all_reduce(torch.tensor(row, dtype=torch.int64), dist.ReduceOp.MAX, what="handshake", on=on)
    fields: dict[str, str] = {}
    for index, (where, computation, mode) in enumerate(passes):
        most, least, count = agreed[3 * index : 3 * index + 3].tolist()
        own, close = digests[index], ""
        if most == -least and count > 0:
            within = _compare_within(world, computation, mode, list(own), unsteady[index], on=on)
            own = {name: digest for name, digest in own.items() if name not in within}
            close = f"; {', '.join(list(within)[:3])} within {max(within.values()):.3g}" if within else ""
            if world.rank == 0 and within:
                names = ", ".join(list(within)[:3]) + (", ..." if len(within) > 3 else "")
                print(
                    f"esper: {where}: {names} do not equal themselves when computed twice (by up to "
                    f"{max(within.values()) / SLACK:.3g}); the ranks are equal within {SLACK:g} times that",
                    file=sys.stderr,
                    flush=True,
                )
        if failures[index] and world.rank == 0:
            print(f"esper: {where} is not compared over ranks: {failures[index]}", file=sys.stderr, flush=True)
        gradients = {name: digest for name, digest in own.items() if name.startswith("gradient of ")}
        outputs = {name: digest for name, digest in own.items() if name not in gradients}
        fields[f"output of {where}"] = f"{_fold(outputs):016x}{close}"
        fields[f"gradients of {where}"] = f"{_fold(gradients):016x}"
    return fields


def _compare_within(
    world: World, computation: Computation, mode: str, names: list[str], unsteady: list[str], *, on: str
) -> dict[str, float]:
    """The tensors that are equal over ranks within `SLACK` times their difference from themselves, with that bound.

    Args:
        world: the ranks; all of them call this, since some rank found a tensor that does not equal itself.
        computation: what is repeated.
        mode: "train" or "eval".
        names: of all tensors, the same on every rank.
        unsteady: the names that did not equal themselves on this rank.
        on: group of the collectives.
    """
    flags = torch.tensor([int(name in unsteady) for name in names], dtype=torch.int64)
    world.all_reduce(flags, dist.ReduceOp.MAX, what="handshake", on=on)
    wanted = [name for name, flag in zip(names, flags.tolist(), strict=True) if flag]
    runs = [
        {name: t.cpu().double().flatten().nan_to_num() for name, t in computation.run(mode).items() if name in wanted}
        for _ in range(1 + REPEATS)
    ]
    within = {}
    for name in wanted:
        first = runs[0][name]
        spread = max(_widest(run[name] - first) for run in runs[1:])
        apart = torch.tensor([spread], dtype=torch.float64)
        bound = SLACK * float(world.all_reduce(apart, dist.ReduceOp.MAX, what="handshake", on=on))
        widest = 0.0
        for piece in first.split(CHUNK):
            ends = torch.cat([piece, -piece])
            world.all_reduce(ends, dist.ReduceOp.MAX, what="handshake", on=on)
            widest = max(widest, _widest(ends[: len(piece)] + ends[len(piece) :]))
        if widest <= bound:
            within[name] = bound
    return within


def _widest(difference: Tensor) -> float:
    return float(difference.abs().max()) if difference.numel() else 0.0
