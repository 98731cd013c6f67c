"""Random streams: reads them, sets them, and keeps them as they are. The only file that forks torch's generators.

A forward that measures, checks or rehearses may draw random numbers (dropout, a sampler, a model's own noise); training
must not notice. Only the CPU's stream and those of the named devices are read: touching another GPU would make a
context on it, in every rank of the machine.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def rng_state(device: torch.device) -> dict[str, Tensor | None]:
    """Reads this rank's global random number state."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"rng_cpu": torch.get_rng_state(), "rng_cuda": cuda}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts back a state that `rng_state` read."""
    torch.set_rng_state(state["rng_cpu"])
    if device.type == "cuda" and state["rng_cuda"] is not None:
        torch.cuda.set_rng_state(state["rng_cuda"], device)


def cuda_devices(*where: torch.device | Tensor | nn.Module) -> list[torch.device]:
    """Lists the CUDA devices among devices, tensors and modules (their parameters and buffers), each once, in order."""
    devices: set[torch.device] = set()
    for item in where:
        if isinstance(item, nn.Module):
            devices |= {tensor.device for tensor in (*item.parameters(), *item.buffers())}
        else:
            devices.add(item.device if isinstance(item, Tensor) else item)
    return sorted((device for device in devices if device.type == "cuda"), key=str)


def read_streams(devices: Iterable[torch.device]) -> list[Tensor]:
    """Reads the states of the CPU's stream and of those of CUDA devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def set_streams(devices: Sequence[torch.device], streams: Sequence[Tensor]) -> None:
    """Puts back what `read_streams` read."""
    torch.set_rng_state(streams[0])
    for device, state in zip(devices, streams[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def seed_rank(seed: int, rank: int, step: int | None = None) -> None:
    """Gives this rank a global stream of its own, so that hidden uses of the global stream show as differing ranks.

    Args:
        seed: the run's seed.
        rank: this rank.
        step: the optimizer step at which a rank resumes without a saved stream; None at the beginning of a run.
    """
    torch.manual_seed(seed * 1_000_003 + (rank if step is None else rank * 7919 + step))


@contextlib.contextmanager
def undisturbed(*where: torch.device | Tensor | nn.Module, seed: int | None = None) -> Iterator[None]:
    """After the block the random streams are as they were before it.

    Args:
        where: devices whose streams are kept beside the CPU's; a tensor or module stands for the devices it is on.
        seed: seeds the streams inside the block; with None they go on from where they are.
    """
    with torch.random.fork_rng(cuda_devices(*where)):
        if seed is not None:
            torch.manual_seed(seed)
        yield
