"""The memory of a rank at the peak of a step, forecast by building the host on the CPU and hearing one forward.

    weights, gradients, moments   parameters x bytes of a number; gradients once more with several ranks, whose reducer
                                  has a copy; an average of the weights is one more
    activations                   what the backward keeps of a forward and its loss, counted at two sizes of batch and
                                  taken to the samples of a rank's forward pass
    temporaries                   gradients of activations on their way back: twice the largest that is kept

Seeds (`slots.memory` caps those), a teacher, the data, and what torch and the device's libraries take are not in it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map_only

from esper.config.tree import EsperConfig
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.hosts.recompute import recompute_blocks
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import arguments
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import EsperError, one_line
from esper.run.assembly import build_grown
from esper.tolaria.data import Bundle, load_data
from esper.tolaria.growth.forecast import moments_of
from esper.tolaria.tasks.bind import bind
from esper.tolaria.training.length import forwards_of
from esper.tolaria.training.precision import autocast, dtype_of

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryForecast:
    """Bytes on a rank.

    Fields:
        weights: parameters and buffers, with an average of them.
        gradients: with the reducer's copy.
        moments: of the optimizer.
        activations: of one forward pass.
        temporaries: of its backward.
        samples: samples of that pass.
    """

    weights: int
    gradients: int
    moments: int
    activations: int
    temporaries: int
    samples: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.moments + self.activations + self.temporaries

    def __str__(self) -> str:
        names = ("weights", "gradients", "moments", "temporaries", "activations")
        parts = [f"{getattr(self, name) / MIB:,.1f} {name}" for name in names]
        return (
            f"memory of a rank at the peak of a step, forecast: {self.total / MIB:,.1f} MiB ({', '.join(parts)} of "
            f"{self.samples} samples a forward); without seeds, data, and what torch itself takes"
        )


def sizes_kept(config: EsperConfig, grown: Grown, bundle: Bundle, samples: int) -> list[int]:
    """Bytes of each tensor that the backward keeps of a forward over training samples and of its loss, but weights."""
    kept: dict[int, Tensor] = {}
    known = {tensor.untyped_storage()._cdata for tensor in (*grown.model.parameters(), *grown.model.buffers())}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other storage gets its address
        return tensor

    dtype, device = dtype_of(config.trainer.precision), next(grown.model.parameters()).device
    batch = bundle.train.fetch(torch.arange(samples))
    x, y = tree_map_only(Tensor, lambda leaf: leaf.to(device, dtype if leaf.is_floating_point() else None), batch)
    args, kwargs = arguments(copy_inputs(x))
    training = grown.model.training
    with undisturbed(grown.model), saved_tensors_hooks(keep, lambda tensor: tensor):
        grown.model.train()
        with autocast(config.trainer.precision, device):
            output = grown.model(*args, **kwargs)
        bundle.learns.learned(output, y)
    grown.model.train(training)
    return [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in known]


def forecast_memory(config: EsperConfig) -> MemoryForecast:
    """Forecasts it for the settings of a run.

    Raises:
        EsperError: the parts do not fit each other.
    """
    bundle = bind(load_data(config.data), config.task)
    grown, trainer = build_grown(config, bundle, torch.device("cpu")), config.trainer
    if trainer.recompute:
        recompute_blocks(grown.model, config.host.kind)
    ranks = config.world.nnodes * config.world.nproc_per_node
    samples = math.ceil(math.ceil(trainer.batch / ranks) / forwards_of(trainer, bundle, ranks))
    few = max(2, bundle.learns.group)
    one, two = (sizes_kept(config, grown, bundle, size) for size in (few, 2 * few))

    def grow(measure: Callable[[list[int]], int]) -> int:
        """A measure of what is kept, taken to the samples of a pass."""
        return max(0, math.ceil(measure(one) + (measure(two) - measure(one)) / few * (samples - few)))

    tensors: list[Any] = [*grown.model.parameters(), *grown.model.buffers()]
    weights = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    learned = sum(p.numel() * p.element_size() for p in grown.model.parameters() if p.requires_grad)
    return MemoryForecast(
        weights=weights * (1 if trainer.ema is None else 2),
        gradients=learned * (2 if ranks > 1 else 1),
        moments=learned * moments_of(config.optim),
        activations=grow(sum),
        temporaries=2 * grow(max),
        samples=samples,
    )


def _describe_snapshots(config: EsperConfig, forecast: MemoryForecast) -> str:
    """What the governor's snapshots take, on the machine whatever the device; empty without a governor."""
    if not config.governor.enabled:
        return ""
    each, ranks = forecast.weights + forecast.moments, config.world.nproc_per_node
    total, them = config.governor.ring * each, "" if ranks == 1 else f", which its {ranks} ranks share"
    return (
        f"; beside it {config.governor.ring} snapshots (governor.ring) of {each / MIB:,.1f} MiB on each machine{them}, "
        f"{total / MIB:,.1f} MiB of its memory"
    )


def describe_memory(config: EsperConfig) -> str:
    """The forecast in a line; why there is none where the parts cannot be built here."""
    try:
        forecast = forecast_memory(config)
        return f"{forecast}{_describe_snapshots(config, forecast)}"
    except (EsperError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"memory: not forecast, since host and data cannot be built here: {one_line(error)}"
