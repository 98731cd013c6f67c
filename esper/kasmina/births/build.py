"""Symmetric birth: every rank builds the same seed, and no random stream moves except the seed's own.

A seed is built by its own constructor on CPU in float32 while a dispatch mode hands one private generator, keyed by
(run seed, slot, generation), to every random ATen operator the constructor executes; then it is cast and moved. So the
weights are a pure function of the key, need no broadcast, and leave dropout, augmentation and the next birth as they
were. Other ways fall short: ``reset_parameters`` takes no generator, a build on the meta device loses what a
constructor computes, and ``fork_rng`` rewinds the global stream while other threads use it.

The generator does not reach randomness outside torch (``random``, ``numpy.random``): a constructor must not draw from
it, and a blueprint whose constructor does is refused when it registers.
"""

import functools
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from esper.kasmina.blueprints.registry import get
from esper.kasmina.slots.gating import BlendGate
from esper.leyline.slots import parse_slot
from esper.leyline.topology import Topology


def birth_key(run_seed: int, slot: str, generation: int) -> int:
    """Computes the 63-bit key of one birth: BLAKE2b of (run seed, slot id, births in that slot before this one).

    Raises:
        ConfigError: ``slot`` is no canonical slot id.
    """
    text = f"{int(run_seed)}/{parse_slot(slot)}/{int(generation)}"
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"esper.birth").digest()
    return int.from_bytes(digest, "big") >> 1


def gate_key(run_seed: int, slot: str, generation: int, step: int) -> int:
    """Computes the 63-bit key of a gate's birth: BLAKE2b of (run seed, slot id, seed's birth, first step of the ramp).

    Raises:
        ConfigError: ``slot`` is no canonical slot id.
    """
    text = f"{int(run_seed)}/{parse_slot(slot)}/{int(generation)}/{int(step)}"
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"esper.gate").digest()
    return int.from_bytes(digest, "big") >> 1


def _signature_of(op: torch._ops.OpOverload) -> list[tuple[str, str, bool]]:
    """Name, type and keyword-only flag of each argument but the generator."""
    arguments = op._schema.arguments
    return [(arg.name, str(arg.type), arg.kwarg_only) for arg in arguments if arg.name != "generator"]


def _generator_place(op: torch._ops.OpOverload) -> int | None:
    """Returns the index of the generator among an operator's arguments, None if it takes none."""
    return next((i for i, arg in enumerate(op._schema.arguments) if arg.name == "generator"), None)


@functools.cache
def _resolve(op: torch._ops.OpOverload) -> tuple[torch._ops.OpOverload, int] | None:
    """Returns the overload of ``op`` that takes a generator, and that argument's index; None if ``op`` is not random.

    Raises:
        RuntimeError: the operator is random and no overload of it takes a generator.
    """
    place = _generator_place(op)
    if place is not None:
        return op, place
    if torch.Tag.nondeterministic_seeded not in op.tags:
        return None
    packet = op.overloadpacket
    for name in packet.overloads():
        sibling = getattr(packet, name)
        place = _generator_place(sibling)
        if place is not None and _signature_of(sibling) == _signature_of(op):
            return sibling, place
    raise RuntimeError(
        f"{op} draws random numbers but takes no generator, so ranks could not build the same seed; "
        "use an operator that takes one (uniform_, normal_, bernoulli_, rand, randn, randint, randperm) when building"
    )


def _is_global(generator: torch.Generator | None) -> bool:
    """Whether this is no generator, or torch's global CPU one, which arrives in a new Python object at every call."""
    return generator is None or generator._cdata == torch.default_generator._cdata  # type: ignore[attr-defined]


class PrivateGenerator(TorchDispatchMode):
    """While active in this thread, every random ATen operator on CPU draws from one private generator.

    An operator that was given the caller's own generator keeps it; torch's global one counts as none.

    Args:
        key: seed of the private generator, 0 to 2**63 - 1.

    Raises:
        RuntimeError: from an operator that draws random numbers but takes no generator; the text names it.

    Example:
        >>> with PrivateGenerator(birth_key(0, "r0c0", 0)):
        ...     layer = torch.nn.Linear(8, 8)
    """

    def __init__(self, key: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(key)

    def __enter__(self) -> "PrivateGenerator":
        """Enters the mode for this thread alone.

        torch's own entry also sets flags of the whole process: a compiled region that another thread calls meanwhile
        would go eager, and two threads would leave the flags wrong.
        """
        _push_mode(self)
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the mode."""
        _pop_mode()

    def __torch_dispatch__(
        self, func: torch._ops.OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs ``func`` with the private generator if it is random, else as it is."""
        kwargs = dict(kwargs or {})
        resolved = _resolve(func)
        if resolved is None:
            return func(*args, **kwargs)
        op, place = resolved
        if op is func and place < len(args):  # a few operators take it by position
            if _is_global(args[place]):
                args = (*args[:place], self.generator, *args[place + 1 :])
        elif _is_global(kwargs.get("generator")):
            kwargs["generator"] = self.generator
        return op(*args, **kwargs)


@contextmanager
def _plain_float32() -> Iterator[None]:
    """Within the block: CPU, float32, ordinary autograd tensors, whatever defaults the caller has set."""
    before = torch.get_default_dtype()
    if before is not torch.float32:
        torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        if before is not torch.float32:
            torch.set_default_dtype(before)


def build_seed(
    blueprint: str, *, dim: int, topology: Topology, key: int, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """Builds the seed of one birth: the same bits on every rank, every other random stream untouched.

    Args:
        blueprint: registered name.
        dim: channels C of the slot's features.
        topology: what their axes mean.
        key: from `birth_key`.
        dtype: dtype that the finished seed is cast to; it is built in float32.
        device: device that the finished seed is moved to; it is built on CPU.

    Returns:
        A module in train mode, ``forward(x) -> delta`` of x's shape.

    Raises:
        ConfigError: no such blueprint for this topology.
        ValueError: the blueprint cannot serve ``dim``.
        RuntimeError: its constructor uses a random operator that takes no generator.
    """
    backend = get(topology, blueprint).backend_for(torch.device(device), dtype)
    return construct(blueprint, dim=dim, topology=topology, key=key, dtype=dtype, backend=backend).to(device)


def construct(
    blueprint: str,
    *,
    dim: int,
    topology: Topology,
    key: int,
    dtype: torch.dtype,
    backend: str | None,
    device: str = "cpu",
) -> nn.Module:
    """Builds a seed like `build_seed`, but leaves it on the device where it was built.

    Args:
        blueprint: registered name.
        dim: channels C of the slot's features.
        topology: what their axes mean.
        key: from `birth_key`.
        dtype: dtype that the finished seed is cast to.
        backend: implementation to use, as the blueprint's ``backend_for`` chose it for the seed's later device.
        device: "cpu", or "meta" for shapes without values.
    """
    entry = get(topology, blueprint)
    with _plain_float32(), torch.device(device), PrivateGenerator(key):
        seed = entry.build(dim, backend)
    return seed.to(dtype=dtype)


def build_gate(*, dim: int, topology: Topology, key: int, dtype: torch.dtype, device: torch.device | str) -> BlendGate:
    """Builds the gate that GATE trains beside a seed, as symmetric as the seed's own birth.

    Args:
        dim: channels C of the slot's features.
        topology: what their axes mean.
        key: from `gate_key`.
        dtype: dtype that the gate is cast to.
        device: device that the gate is moved to.
    """
    with _plain_float32(), PrivateGenerator(key):
        gate = BlendGate(dim, topology)
    return gate.to(device=device, dtype=dtype)
