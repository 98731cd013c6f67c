"""Running statistics (BatchNorm) of the network that is judged, and not of the one that happens to train now.

A layer that normalises by running statistics computes, in eval(), with averages over the network that took them. A seed
that is switched changes what the layers behind it see, so the averages of the one arm of a comparison are wrong for the
other: a seed that hurts seems to help where the host's averages were taken with it, and one that helps is refused where
they were taken without. So each arm takes averages of its own, from the same batches of training data, as one pass of
training-mode forwards with equal weights (Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm", section 3: precise
BatchNorm). Both arms see the same samples and begin each batch with the same random numbers.

    statistics = take_statistics(grown, [{"r0c0": 0.0}, {"r0c0": 1.0}], batches, forward)
    for each in statistics:
        with each.applied(): ...      # eval(): the arm's own averages

The model keeps its buffers: forwards work on clones. Nothing here communicates; ranks that are given the same batches
take the same statistics.
"""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm, _NormBase

from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import ConfigError

NAMES = ("running_mean", "running_var", "num_batches_tracked")
SEED = 20  # of the random numbers of these forwards, the same for all arms

Alphas = Mapping[str, float]
Buffers = list[tuple[nn.Module, str, Tensor | None]]


def tracking(model: nn.Module) -> list[_NormBase]:
    """The layers that normalise by running statistics, and take them in training.

    A layer that the user keeps in eval() while the model trains (frozen statistics) is none of them.
    """
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase)
        and module.track_running_stats
        and module.running_mean is not None
        and (module.training or not model.training)
    ]


@contextlib.contextmanager
def _holding(buffers: Buffers) -> Iterator[None]:
    """Within the block the modules have these buffers, then their own objects again."""
    before = [(module, name, module._buffers[name]) for module, name, _ in buffers]
    try:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer
        yield
    finally:
        for module, name, buffer in before:
            module._buffers[name] = buffer


@dataclass(frozen=True, slots=True)
class Statistics:
    """The running statistics of one arm; empty for a model that has none."""

    buffers: Buffers

    def applied(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the model normalises by these statistics."""
        return _holding(self.buffers)

    def copied(self) -> "Statistics":
        """The same statistics in tensors of their own."""
        return Statistics([(module, name, None if one is None else one.clone()) for module, name, one in self.buffers])

    @property
    def is_finite(self) -> bool:
        """Whether every number is finite; waits for the device."""
        return bool(torch.stack([torch.isfinite(one).all() for *_, one in self.buffers if one is not None]).all())


def _begin(layers: Sequence[_NormBase]) -> Statistics:
    buffers: Buffers = []
    for layer in layers:
        mean, var = layer.running_mean, layer.running_var
        assert mean is not None
        assert var is not None
        fresh = (torch.zeros_like(mean), torch.ones_like(var), torch.zeros((), dtype=torch.int64, device=mean.device))
        buffers += [(layer, name, buffer) for name, buffer in zip(NAMES, fresh, strict=True)]
    return Statistics(buffers)


@contextlib.contextmanager
def _as_in_training(model: nn.Module, layers: Sequence[_NormBase]) -> Iterator[None]:
    """Within the block the model trains, on clones of its buffers and without a collective; then it is as it was."""
    flags = [(module, module.training) for module in model.modules()]
    momenta = [(layer, layer.momentum) for layer in layers]
    clones: Buffers = [
        (module, name, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    synced = [layer for layer in layers if isinstance(layer, SyncBatchNorm)]
    try:
        with _holding(clones), torch.no_grad():
            if not model.training:
                model.train()
            for each in synced:
                each.forward = partial(_BatchNorm.forward, each)  # type: ignore[method-assign]
            yield
    finally:
        for each in synced:
            del each.forward
        for layer, momentum in momenta:
            layer.momentum = momentum
        for module, training in flags:
            module.training = training


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """Within the block compiled regions run eagerly: a few forwards are not worth graphs of their own."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes two seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def take_statistics(
    grown: Grown, arms: Sequence[Alphas], batches: Iterable[Any], forward: Callable[[Any], object]
) -> list[Statistics]:
    """Takes statistics for each arm from the same batches; a model without running statistics reads no batch.

    Args:
        grown: the model; it is left as it was.
        arms: alpha overrides of each arm; other slots keep their alpha.
        batches: batches of training data, all of about the same size; each counts the same. One that is not finite
            in any arm is left out, since what is wrong with it is not the seed; if all are, or if the host itself is
            broken, every arm has the model's own statistics.
        forward: runs the model on a batch, as training does; its result is not used.

    Returns:
        The statistics, in the order of ``arms``.

    Raises:
        ConfigError: there is no batch.
    """
    model = grown.model
    layers = tracking(model)
    taken = [_begin(layers) for _ in arms]
    if not layers:
        return taken
    own = Statistics([(layer, name, getattr(layer, name)) for layer in layers for name in NAMES])
    if not own.is_finite:  # a host that is broken must not look sound
        return [Statistics([]) for _ in arms]
    seen = kept = 0
    with _as_in_training(model, layers), _uncompiled():
        for batch in batches:
            seen += 1
            for layer in layers:  # the average over batches with equal weights
                layer.momentum = None if isinstance(layer, _BatchNorm) else 1.0 / (kept + 1)
            before = [statistics.copied() for statistics in taken]
            for alphas, statistics in zip(arms, taken, strict=True):
                with statistics.applied(), grown.override(alphas), undisturbed(model, seed=SEED):
                    forward(batch)
            if any(statistics.is_finite for statistics in taken):
                kept += 1
            else:
                taken = before
    if not seen:
        raise ConfigError("the model has BatchNorm: give training batches (statistics=) to take its statistics from")
    return taken if kept else [Statistics([]) for _ in arms]
