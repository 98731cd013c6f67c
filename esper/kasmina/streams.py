"""Random streams: seeds, reads and sets them, and keeps them as they are. The only file that forks generators.

The global streams are torch's (the CPU's and those of the named devices), Python's `random` and numpy's: a model, a
loss or an augmentation of the user's own may draw from any of them. A forward that measures, checks or rehearses may
draw; training must not notice. Only the named devices are read: touching another GPU would make a context on it, in
every rank of the machine. What a program keeps in generators or counters of its own is its own matter.
"""

import contextlib
import random
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from esper.leyline.errors import CheckpointError

_WORDS = 624  # of a Mersenne twister; Python's state has the position behind them


class Streams(NamedTuple):
    """States of the global streams, to be put back in this process."""

    cpu: Tensor
    """torch's CPU stream."""
    cuda: tuple[Tensor, ...]
    """torch's stream of each device that was asked for."""
    python: Any
    """The state of `random`."""
    numpy: Any
    """The state of numpy's global generator."""


def read_streams(devices: Sequence[torch.device] = ()) -> Streams:
    """Reads the global streams of this process.

    Args:
        devices: CUDA devices whose streams are read, too.
    """
    cuda = tuple(torch.cuda.get_rng_state(device) for device in devices)
    return Streams(torch.get_rng_state(), cuda, random.getstate(), np.random.get_state(legacy=False))


def set_streams(streams: Streams, devices: Sequence[torch.device] = ()) -> None:
    """Puts back what `read_streams` read, with the same devices."""
    torch.set_rng_state(streams.cpu)
    for device, state in zip(devices, streams.cuda, strict=True):
        torch.cuda.set_rng_state(state, device)
    random.setstate(streams.python)
    np.random.set_state(streams.numpy)


def moved(before: Streams, after: Streams) -> bool:
    """Whether any of the streams has been drawn from between two readings on the same devices."""
    tensors = zip((before.cpu, *before.cuda), (after.cpu, *after.cuda), strict=True)
    if not all(torch.equal(one, other) for one, other in tensors) or before.python != after.python:
        return True
    return not _equal(before.numpy, after.numpy)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return all(_equal(one[key], other[key]) for key in one)
    return bool(np.array_equal(one, other))


def seed_streams(seed: int) -> None:
    """Seeds every global stream: torch's on all devices, Python's and numpy's."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def rng_state(device: torch.device) -> dict[str, Tensor | None]:
    """Reads this rank's global streams as tensors, for a file.

    Raises:
        CheckpointError: numpy's global generator is none of the Mersenne twisters that it comes with.
    """
    streams = read_streams(cuda_devices(device))
    return {
        "rng_cpu": streams.cpu,
        "rng_cuda": streams.cuda[0] if streams.cuda else None,
        "rng_python": _pack_python(streams.python),
        "rng_numpy": _pack_numpy(streams.numpy),
    }


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts back a state that `rng_state` read."""
    torch.set_rng_state(state["rng_cpu"])
    if device.type == "cuda" and state["rng_cuda"] is not None:
        torch.cuda.set_rng_state(state["rng_cuda"], device)
    random.setstate(_unpack_python(state["rng_python"]))
    np.random.set_state(_unpack_numpy(state["rng_numpy"]))


def _bits(value: float) -> int:
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


def _value(bits: int) -> float:
    return float(struct.unpack("<d", struct.pack("<q", bits))[0])


def _pack_python(state: Any) -> Tensor:
    """int64 [628]: version, words and position, whether a Gaussian number waits, its bits."""
    version, words, gauss = state
    return torch.tensor([version, *words, int(gauss is not None), _bits(gauss or 0.0)], dtype=torch.int64)


def _unpack_python(packed: Tensor) -> Any:
    version, *words, waits, bits = packed.tolist()
    return version, tuple(words), _value(bits) if waits else None


def _pack_numpy(state: Any) -> Tensor:
    """int64 [627]: words, position, whether a Gaussian number waits, its bits."""
    if state["bit_generator"] != "MT19937":
        raise CheckpointError(
            f"numpy's global generator is a {state['bit_generator']}; only its own MT19937 can be saved: draw from a "
            "generator of your own instead of np.random.set_bit_generator"
        )
    key = state["state"]["key"].tolist()
    return torch.tensor([*key, state["state"]["pos"], state["has_gauss"], _bits(state["gauss"])], dtype=torch.int64)


def _unpack_numpy(packed: Tensor) -> Any:
    *key, position, waits, bits = packed.tolist()
    assert len(key) == _WORDS
    words = np.array(key, dtype=np.uint32)
    return {
        "bit_generator": "MT19937",
        "state": {"key": words, "pos": position},
        "has_gauss": waits,
        "gauss": _value(bits),
    }


def cuda_devices(*where: torch.device | Tensor | nn.Module) -> list[torch.device]:
    """Lists the CUDA devices among devices, tensors and modules (their parameters and buffers), each once, in order."""
    devices: set[torch.device] = set()
    for item in where:
        if isinstance(item, nn.Module):
            devices |= {tensor.device for tensor in (*item.parameters(), *item.buffers())}
        else:
            devices.add(item.device if isinstance(item, Tensor) else item)
    return sorted((device for device in devices if device.type == "cuda"), key=str)


def seed_rank(seed: int, rank: int, step: int | None = None) -> None:
    """Gives this rank global streams of its own, so that hidden uses of a global stream show as differing ranks.

    Args:
        seed: the run's seed.
        rank: this rank.
        step: the optimizer step at which a rank resumes without saved streams; None at the beginning of a run.
    """
    seed_streams(seed * 1_000_003 + (rank if step is None else rank * 7919 + step))


@contextlib.contextmanager
def undisturbed(*where: torch.device | Tensor | nn.Module, seed: int | None = None) -> Iterator[None]:
    """After the block the random streams are as they were before it.

    Args:
        where: devices whose streams are kept beside the CPU's; a tensor or module stands for the devices it is on.
        seed: seeds the streams inside the block; with None they go on from where they are.
    """
    devices = cuda_devices(*where)
    streams = read_streams(devices)
    try:
        if seed is not None:
            seed_streams(seed)
        yield
    finally:
        set_streams(streams, devices)
