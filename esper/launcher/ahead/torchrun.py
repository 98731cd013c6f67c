"""torchrun as the launcher starts it: its arguments, the command line of its agent, its variables."""

import os
import sys
import uuid
from pathlib import Path

from esper.tolaria.ranks.config import Device, WorldConfig
from esper.tolaria.training.config import TrainerConfig


def torchrun_arguments(
    world: WorldConfig,
    config_path: Path,
    module: str = "esper.worker",
    *,
    is_first: bool | None = None,
    own_name: str | None = None,
    patience_s: float | None = None,
) -> list[str]:
    """The arguments of ``torchrun`` on the command line.

    Args:
        world: ranks, hosts and the rendezvous.
        config_path: RUN/config.yaml.
        module: the module that each rank runs.
        is_first: whether the rendezvous is on this host; None lets torchrun find out, which fails with DNS aliases.
        own_name: the name by which the other hosts reach this one; None takes its hostname.
        patience_s: seconds that the hosts wait for each other; None takes torchrun's ten minutes.
    """
    alone = world.nnodes == 1
    endpoint = world.rdzv_endpoint
    if alone and endpoint in (None, "slurm"):
        endpoint = "localhost:0"
    conf = [] if is_first is None else [f"is_host={int(is_first)}"]
    conf += [] if patience_s is None else [f"join_timeout={patience_s:.0f}"]
    return [
        f"--nnodes={world.nnodes}",
        f"--nproc-per-node={world.nproc_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={world.rdzv_id or uuid.uuid4().hex[:12]}",
        # A host whose own name does not resolve can still talk to itself.
        *(["--local-addr=localhost"] if alone else [f"--local-addr={own_name}"] if own_name else []),
        *([f"--rdzv-conf={','.join(conf)}"] if conf and not alone else []),
        f"--max-restarts={world.max_restarts}",
        "-m",
        module,
        str(config_path),
    ]


def rendezvous_of(arguments: list[str]) -> str:
    """The name of the rendezvous in `torchrun_arguments`; its ranks see it as TORCHELASTIC_RUN_ID."""
    return next(word.removeprefix("--rdzv-id=") for word in arguments if word.startswith("--rdzv-id="))


def agent_command(arguments: list[str]) -> list[str]:
    """The command line of torchrun as `esper.launcher.agent` runs it."""
    return [sys.executable, "-m", "esper.launcher.agent", *arguments]


# glibc returns blocks of 128 KiB and more to the kernel when they are freed, so that every activation of every step is
# paged in anew. If it keeps them, a step of a small CNN takes two thirds of the time. Bytes; 32 MiB is glibc's limit.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)}


def torchrun_environment(world: WorldConfig, trainer: TrainerConfig) -> dict[str, str]:
    """The variables that every torchrun of a run needs, beside those that it inherits."""
    needed = {"OMP_NUM_THREADS": str(world.threads), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONUNBUFFERED": "1"}
    if world.device is Device.CPU and not any(name in os.environ for name in MALLOC):
        needed |= MALLOC
    if world.device is Device.GPU and trainer.deterministic:
        needed["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    return needed
