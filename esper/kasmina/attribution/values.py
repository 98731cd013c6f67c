"""The values of a plan's coalitions on one batch: with shared prefixes, stacked along the batch, or by full forwards.

All three see the same inputs. Shared and full forwards give the same bits, and the same random numbers to every
coalition. A stacked forward has other batch sizes, so that it agrees only to rounding, and draws other numbers if a
model draws any in eval(). Shared is the fastest, by measurement (README).

Shapes: B samples of a batch, M coalitions.
"""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from esper.kasmina.attribution.coalitions import Plan
from esper.kasmina.attribution.prefixes import How, forward_parts
from esper.kasmina.attribution.statistics import Statistics
from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.hosts.resume import Resumable, State
from esper.kasmina.slots.confidence import confident
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import arguments
from esper.kasmina.streams import Streams, cuda_devices, read_streams, set_streams, undisturbed
from esper.leyline.errors import ConfigError

# per_sample(model output, target) -> loss [B] in nats, correct [B] in [0, 1]; a sequence is one sample
PerSample = Callable[[Any, Any], tuple[Tensor, Tensor]]


def values_of(
    grown: Grown,
    plan: Plan,
    how: How,
    host: Resumable | None,
    inputs: Any,
    target: Any,
    per: PerSample,
    statistics: Mapping[int, Statistics],
) -> Tensor:
    """Measures the values, float64 [M, 2, B]: by coalition, unit (minus loss, correct) and sample, without gradient.

    Args:
        grown: the model, in eval().
        plan: the coalitions.
        how: the kind of forwards that `attribute` chose.
        host: the host if it can resume, else None.
        inputs: of one batch, as for `arguments`.
        target: target of that batch.
        per: see `PerSample`.
        statistics: running statistics of each coalition; empty if the model has none.
    """
    if how is How.STACKED:
        return _run_stacked(grown, plan, host, inputs, target, per)
    return _run_separately(grown, plan, host, inputs, target, per, statistics)


def _value(loss: Tensor, correct: Tensor) -> Tensor:
    if loss.ndim != 1 or loss.shape != correct.shape:
        raise ValueError(
            f"per_sample returned loss {list(loss.shape)} and correct {list(correct.shape)}, need both [B]: one number "
            "per sample, not their mean"
        )
    return torch.stack([-loss.double(), correct.double()])


def _run_separately(
    grown: Grown,
    plan: Plan,
    host: Resumable | None,
    inputs: Any,
    target: Any,
    per: PerSample,
    statistics: Mapping[int, Statistics],
) -> Tensor:
    """Returns [M, 2, B]. A stack holds the states from which later parts begin, and the random streams there.

    Coalitions that share a part agree on all slots before its end, and so on the statistics of the layers in it.
    """
    devices = cuda_devices(grown.model)
    args, _ = arguments(inputs)
    states: list[tuple[State, Streams]] = []
    values: dict[int, Tensor] = {}
    with undisturbed(grown.model):
        begin = read_streams(devices)
        for part in forward_parts(plan, host.slot_order() if host else None):
            del states[part.depth :]
            state, streams = states[-1] if states else ((), begin)
            set_streams(streams, devices)
            first = part.coalitions[0]
            own = statistics[first].applied() if statistics else contextlib.nullcontext()
            with grown.override(plan.alphas(first)), own:
                if host is not None and part.start is not None:
                    result = host.forward_from(state, part.start, until=part.until)
                elif host is not None and part.until is not None:
                    result = host.forward_to(args[0], part.until)
                else:
                    own_args, kwargs = arguments(copy_inputs(inputs))
                    with confident(grown, *own_args, **kwargs):
                        result = grown.model(*own_args, **kwargs)
            if part.until is not None:
                states.append((result, read_streams(devices)))
            else:
                value = _value(*per(result, target))
                values |= dict.fromkeys(part.coalitions, value)
    return torch.stack([values[coalition] for coalition in plan.coalitions])


def _repeat(leaf: Tensor, samples: int, times: int) -> Tensor:
    if leaf.ndim == 0 or len(leaf) != samples:
        raise ConfigError(
            f"stacked coalitions: an input or target is {list(leaf.shape)} in a batch of {samples}; need one row per "
            "sample, or shared prefixes"
        )
    return leaf.repeat(times, *[1] * (leaf.ndim - 1))


def _run_stacked(grown: Grown, plan: Plan, host: Resumable | None, inputs: Any, target: Any, per: PerSample) -> Tensor:
    """Returns [M, 2, B] from one forward of M * B samples, from the plan's first slot on if the host can resume."""
    times = len(plan.coalitions)
    args, kwargs = arguments(inputs)
    samples = len(next(leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)))

    def repeat(tree: Any) -> Any:
        return tree_map_only(Tensor, lambda leaf: _repeat(leaf, samples, times), tree)

    masks = torch.tensor(plan.coalitions).repeat_interleave(samples)
    alphas = {slot: (masks >> i & 1) * torch.tensor(level) for i, (slot, level) in enumerate(plan.levels)}
    with undisturbed(grown.model), grown.override(alphas):
        if host is None:
            result = grown.model(*repeat(args), **repeat(kwargs))
        else:
            first = next(slot for slot in host.slot_order() if slot in alphas)
            state: State = repeat(host.forward_to(args[0], first))
            result = host.forward_from(state, first)
    return _value(*per(result, repeat(target))).unflatten(1, (times, samples)).movedim(1, 0)
