"""Memory that a rank finds free: its own measurement, which differs from rank to rank and so decides nothing alone.

It may veto a staged birth, which all ranks then agree on, and raise an alert; it never enters a gate.
"""

import torch

from esper.leyline.machine.room import free_memory


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a rank can still have: on the device, or of the machine and of this job; None if nobody says."""
    if device.type != "cuda":
        return free_memory()
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
