"""A rank that writes down how it began: ``torchrun ... -m tests.support.rank_report FOLDER``.

Every rank writes FOLDER/rank-attempt.json. One that is alone ends. Of two, rank 0 fails in the first attempt, so that
torchrun starts both again; in the second they wait for the end of their agent.
"""

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from esper.launcher.processes import leads_session
from esper.run import parent

MASKS = ("SigBlk", "SigIgn", "SigCgt")  # signals that are blocked, ignored, caught


def masks(pid: int | str) -> dict[str, str]:
    """What a process does with signals, as the kernel writes it."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value for name, value in (line.split(":\t", 1) for line in lines) if name in MASKS}


def digest_of_steps() -> str:
    """A digest of the bits that a few steps of a small network come to."""
    torch.manual_seed(int(os.environ["RANK"]))
    network = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 8))
    weights = list(network.parameters())
    for _ in range(5):
        loss = network(torch.randn(256, 64)).square().mean()
        with torch.no_grad():
            for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
                weight -= 0.1 * gradient
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in network.parameters())).hexdigest()


def report() -> dict[str, Any]:
    """What this process has begun with."""
    began = {
        "threads": len(os.listdir("/proc/self/task")),
        "files": sorted(fd for fd in map(int, os.listdir("/proc/self/fd")) if Path(f"/proc/self/fd/{fd}").exists()),
        "signals": masks("self"),
        "handlers": {str(s): str(signal.getsignal(s)) for s in signal.valid_signals() if s < signal.SIGRTMIN},
        "leads its session": leads_session(os.getpid()),
        "cuda": torch.cuda.is_initialized(),
        "group": dist.is_initialized(),
        "folder": os.getcwd(),
        "path": sys.path,
        "words": sys.argv,
        "name": __name__,
        "own module": "tests.support.rank_report" in sys.modules,
        "operation threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
    }
    return {
        **began,
        "bits": digest_of_steps(),
        "pid": os.getpid(),
        "parent": os.getppid(),
        "variables": dict(os.environ),
        "shown": Path("/proc/self/cmdline").read_bytes().rstrip(b"\0").decode().split("\0"),
    }


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    parent.die_with_parent(parent.PARENT, signal.SIGHUP)
    path = folder / f"{rank}-{attempt}.json"
    path.with_suffix(".part").write_text(json.dumps(report()))
    path.with_suffix(".part").rename(path)
    if os.environ["WORLD_SIZE"] == "1":
        return
    while attempt == 0 and not (folder / "1-0.json").exists():
        time.sleep(0.01)
    while attempt == 1 or rank == 1:
        time.sleep(0.01)
    sys.exit(1)


if __name__ == "__main__":
    main()
