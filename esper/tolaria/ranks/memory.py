"""Memory that a rank finds free: its own measurement, which differs from rank to rank and so decides nothing alone.

It may veto a staged birth, which all ranks then agree on, and raise an alert; it never enters a gate.
"""

from pathlib import Path

import torch

_MEMINFO, _GROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a rank can still have: on the device, or of the machine and of this job; None if nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = []
    try:
        lines = _MEMINFO.read_text().splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")))
    except (OSError, ValueError, IndexError, StopIteration):
        pass
    try:
        most = (_GROUP / "memory.max").read_text().strip()
        if most != "max":
            found.append(int(most) - int((_GROUP / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(found, default=None)
