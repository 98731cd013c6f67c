"""Copies nested plain data into lasting CPU buffers, so that training may go on while a thread writes the copy.

A buffer is kept from one take to the next and used again if path, dtype, shape and strides are the same. New tensors
get new buffers; those of tensors that are gone are freed. Two names of one tensor (tied weights) share one buffer.
Copies from a device are asynchronous, into pinned memory; `ready` waits for them.
"""

from typing import Any

import torch
from torch import Tensor


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
        seen: dict[tuple[Any, ...], Tensor] = {}
        devices: set[torch.device] = set()

        def twin(value: Any, path: str) -> Any:
            if isinstance(value, dict):
                return {key: twin(item, f"{path}/{key}") for key, item in value.items()}
            if isinstance(value, list | tuple):
                items = [twin(item, f"{path}/{index}") for index, item in enumerate(value)]
                return items if isinstance(value, list) else tuple(items)
            if not isinstance(value, Tensor):
                return value
            place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
            if value.numel() and place in seen:
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
            copied = twin(payload, "")
        self._buffers, self._event = used, None
        for device in devices:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))
        return copied

    def ready(self) -> None:
        """Waits until the latest take has arrived; may be called from any thread."""
        if self._event is not None:
            self._event.synchronize()
