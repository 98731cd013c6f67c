"""Copies nested plain data into lasting CPU buffers, so that training may go on while a thread writes the copy.

A buffer is kept from one take to the next and used again if path, dtype, shape and strides are the same. New tensors
get new buffers; those of tensors that are gone are freed. Two names of one tensor (tied weights) share one buffer.
Copies from a device are asynchronous, into pinned memory; `ready` waits for them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Place = tuple[Any, ...]


def place_of(value: Tensor, path: str) -> Place:
    """What two names of one tensor have in common; empty tensors have nothing in common but their path."""
    if not value.numel():
        return (path,)
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def rebuild(payload: Any, put: Callable[[Tensor, str], Tensor], path: str = "") -> Any:
    """The same dicts, lists and tuples, with what ``put`` returns for each tensor and its path."""
    if isinstance(payload, dict):
        return {key: rebuild(item, put, f"{path}/{key}") for key, item in payload.items()}
    if isinstance(payload, list | tuple):
        items = [rebuild(item, put, f"{path}/{index}") for index, item in enumerate(payload)]
        return items if isinstance(payload, list) else tuple(items)
    return put(payload, path) if isinstance(payload, Tensor) else payload


class HostCopy:
    """Holds one copy at a time: a take overwrites what the previous one returned."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._event: Any = None

    def take(self, payload: Any) -> Any:
        """Copies a payload.

        Args:
            payload: dicts, lists and tuples of tensors and of plain immutable values.

        Returns:
            The same structure; its tensors lie on the CPU and do not follow the originals.
        """
        used: dict[str, Tensor] = {}
        seen: dict[Place, Tensor] = {}
        devices: set[torch.device] = set()

        def twin(value: Tensor, path: str) -> Tensor:
            place = place_of(value, path)
            if place in seen:
                return seen[place]
            buffer = self._buffers.get(path)
            shape = (value.dtype, value.shape, value.stride())
            if buffer is None or (buffer.dtype, buffer.shape, buffer.stride()) != shape:
                buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
            if value.is_cuda:
                devices.add(value.device)
            buffer.copy_(value, non_blocking=True)
            used[path] = seen[place] = buffer
            return buffer

        with torch.no_grad():
            copied = rebuild(payload, twin)
        self._buffers, self._event = used, None
        for device in devices:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))
        return copied

    def ready(self) -> None:
        """Waits until the latest take has arrived; may be called from any thread."""
        if self._event is not None:
            self._event.synchronize()

    def read(self, copied: Any) -> Any:
        """What `take` returned, to be copied and not changed."""
        return copied
