"""How long a run must be for as many FLOPs as another has spent."""

import threading

import torch

from esper.accord.account import step_flops
from esper.accord.state import planted_slots
from esper.config.tree import EsperConfig
from esper.kasmina.streams import undisturbed
from esper.run.assembly import build_grown
from esper.run.start.costs import build_costs
from esper.tolaria.data import BatchPlan, Bundle, DataConfig, load_data


class DataCache:
    """Loads each data set once; arms and seeds share it."""

    def __init__(self) -> None:
        self._loaded: dict[str, Bundle] = {}
        self._lock = threading.Lock()

    def __call__(self, config: DataConfig) -> Bundle:
        """As `esper.tolaria.data.load_data`, with its errors."""
        with self._lock:
            key = repr(config)
            if key not in self._loaded:
                self._loaded[key] = load_data(config)
            return self._loaded[key]


def flops_per_sample(config: EsperConfig, bundle: Bundle) -> int:
    """Training FLOPs per sample of a network that does not change: the host and its planted seeds."""
    cpu = torch.device("cpu")
    with undisturbed(cpu):
        grown = build_grown(config, bundle, cpu)
    costs = build_costs(grown, bundle.example())
    return step_flops(planted_slots(list(grown.slots), config.slots), costs, config.slots)


def steps_for(samples: float, plan: BatchPlan) -> int:
    """The number of optimizer steps, at least 1, nearest to ``samples``; the last batch of an epoch may be short, or
    left out.
    """
    epochs, left = divmod(samples, plan.samples_per_epoch)
    below = int(left // plan.batch)
    above = min((below + 1) * plan.batch, plan.samples_per_epoch)
    nearer = above - left < left - below * plan.batch
    return max(1, int(epochs) * plan.steps_per_epoch + below + nearer)
