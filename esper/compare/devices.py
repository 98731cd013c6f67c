"""The cores and GPUs of this machine, shared among the jobs of a comparison."""

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence

import torch

from esper.config.tree import EsperConfig
from esper.leyline.machine.room import usable_cores
from esper.tolaria.ranks.config import Device


class Devices:
    """Gives GPUs of this machine to jobs: each job gets the GPUs that the fewest others use.

    Args:
        names: the GPUs as CUDA_VISIBLE_DEVICES writes them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._jobs = dict.fromkeys(names, 0)
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def take(self, count: int) -> Iterator[dict[str, str]]:
        """The environment of a job on ``count`` GPUs; empty if there are none."""
        with self._lock:
            chosen = sorted(self._jobs, key=lambda name: self._jobs[name])[:count]
            for name in chosen:
                self._jobs[name] += 1
        try:
            yield {"CUDA_VISIBLE_DEVICES": ",".join(chosen)} if chosen else {}
        finally:
            with self._lock:
                for name in chosen:
                    self._jobs[name] -= 1


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES writes them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return chosen.split(",")[:count] if chosen else [str(index) for index in range(count)]


def on_gpu(config: EsperConfig) -> bool:
    """Whether each rank of a run needs a GPU."""
    return config.world.device == Device.GPU


def default_parallel(config: EsperConfig) -> int:
    """The number of jobs that fit at a time: on the cores that this process may use, or on this machine's GPUs."""
    if on_gpu(config):
        return max(1, torch.cuda.device_count() // config.world.nproc_per_node)
    return max(1, usable_cores() // (config.world.nproc_per_node * config.world.threads))
