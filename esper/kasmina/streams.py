"""Random streams: read, set, and left alone. The only file that forks torch's generators.

A forward that measures, checks or rehearses may draw (dropout, a sampler, somebody's own noise); what it draws is no
business of training. Only the CPU's stream and those of the named devices are read: touching another GPU would make a
context on it, in every rank of the machine.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def rng_state(device: torch.device) -> dict[str, Tensor | None]:
    """This rank's global random number state."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"rng_cpu": torch.get_rng_state(), "rng_cuda": cuda}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Takes `rng_state` back."""
    torch.set_rng_state(state["rng_cpu"])
    if device.type == "cuda" and state["rng_cuda"] is not None:
        torch.cuda.set_rng_state(state["rng_cuda"], device)


def cuda_devices(*where: torch.device | Tensor | nn.Module) -> list[torch.device]:
    """The CUDA devices of devices, tensors and modules (of their parameters and buffers), each once, in order."""
    found: set[torch.device] = set()
    for item in where:
        if isinstance(item, nn.Module):
            found |= {tensor.device for tensor in (*item.parameters(), *item.buffers())}
        else:
            found.add(item.device if isinstance(item, Tensor) else item)
    return sorted((device for device in found if device.type == "cuda"), key=str)


def read_streams(devices: Iterable[torch.device]) -> list[Tensor]:
    """States of the CPU's stream and of those of CUDA devices."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)]


def set_streams(devices: Sequence[torch.device], streams: Sequence[Tensor]) -> None:
    """Takes `read_streams` back."""
    torch.set_rng_state(streams[0])
    for device, state in zip(devices, streams[1:], strict=True):
        torch.cuda.set_rng_state(state, device)


def seed_rank(seed: int, rank: int, step: int | None = None) -> None:
    """Gives this rank a global stream of its own, so that a hidden dependence on it cannot pass unseen.

    Args:
        seed: of the run.
        rank: this one.
        step: optimizer step from which a rank goes on that has no stream to go on with; None: from the beginning.
    """
    torch.manual_seed(seed * 1_000_003 + (rank if step is None else rank * 7919 + step))


@contextlib.contextmanager
def undisturbed(*where: torch.device | Tensor | nn.Module, seed: int | None = None) -> Iterator[None]:
    """After the block the random streams are as they were before it.

    Args:
        where: devices, or tensors and modules that lie on them, whose streams are left alone beside the CPU's.
        seed: what the streams begin with inside the block; None: with what they are.
    """
    with torch.random.fork_rng(cuda_devices(*where)):
        if seed is not None:
            torch.manual_seed(seed)
        yield
