"""The values of a plan's coalitions on one batch: with shared prefixes, stacked along the batch, or by full forwards.

All three see the same inputs. Shared and full give the same bits and the same random numbers to every coalition; a
stacked forward has other batch sizes, so that it agrees to rounding, and draws numbers of its own where a model draws
any in eval(). Which is faster was measured (README): shared.

Shapes: B samples of a batch, M coalitions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from esper.kasmina.attribution.coalitions import Plan
from esper.kasmina.attribution.prefixes import How, forward_parts
from esper.kasmina.hosts.resume import Resumable, State
from esper.kasmina.slots.confidence import confident
from esper.kasmina.slots.grown import Grown
from esper.kasmina.streams import cuda_devices, read_streams, set_streams, undisturbed
from esper.leyline.errors import ConfigError

# per_sample(model output, target) -> loss [B] in nats, correct [B] in [0, 1]; a sequence is one sample
PerSample = Callable[[Any, Any], tuple[Tensor, Tensor]]


def values_of(
    grown: Grown, plan: Plan, how: How, host: Resumable | None, args: tuple[Any, ...], target: Any, per: PerSample
) -> Tensor:
    """Value per coalition, unit (minus loss, correct) and sample, float64 [M, 2, B]; in eval() and without gradient.

    Args:
        how, host: as `attribute` chose them. args, target: one batch. per: see `PerSample`.
    """
    if how is How.STACKED:
        return _stacked(grown, plan, host, args, target, per)
    return _apart(grown, plan, host, args, target, per)


def _value(loss: Tensor, correct: Tensor) -> Tensor:
    if loss.ndim != 1 or loss.shape != correct.shape:
        raise ValueError(
            f"per_sample returned loss {list(loss.shape)} and correct {list(correct.shape)}, need both [B]: one number "
            "per sample, not their mean"
        )
    return torch.stack([-loss.double(), correct.double()])


def _apart(
    grown: Grown, plan: Plan, host: Resumable | None, args: tuple[Any, ...], target: Any, per: PerSample
) -> Tensor:
    """[M, 2, B]. A stack holds the states that parts to come begin with, and where the random streams stood there."""
    devices = cuda_devices(grown.model)
    states: list[tuple[State, list[Tensor]]] = []
    values: dict[int, Tensor] = {}
    with undisturbed(grown.model):
        begin = read_streams(devices)
        for part in forward_parts(plan, host.slot_order() if host else None):
            del states[part.depth :]
            state, streams = states[-1] if states else ((), begin)
            set_streams(devices, streams)
            with grown.override(plan.alphas(part.coalitions[0])):
                if host is not None and part.start is not None:
                    result = host.forward_from(state, part.start, until=part.until)
                elif host is not None and part.until is not None:
                    result = host.forward_to(args[0], part.until)
                else:
                    own = tree_map_only(Tensor, torch.clone, args)  # a model may write into its input
                    with confident(grown, *own):
                        result = grown.model(*own)
            if part.until is not None:
                states.append((result, read_streams(devices)))
            else:
                value = _value(*per(result, target))
                values |= dict.fromkeys(part.coalitions, value)
    return torch.stack([values[coalition] for coalition in plan.coalitions])


def _repeated(leaf: Tensor, samples: int, times: int) -> Tensor:
    if leaf.ndim == 0 or len(leaf) != samples:
        raise ConfigError(
            f"stacked coalitions: an input or target is {list(leaf.shape)} in a batch of {samples}; need one row per "
            "sample, or shared prefixes"
        )
    return leaf.repeat(times, *[1] * (leaf.ndim - 1))


def _stacked(
    grown: Grown, plan: Plan, host: Resumable | None, args: tuple[Any, ...], target: Any, per: PerSample
) -> Tensor:
    """[M, 2, B] in one forward of M * B samples, from the plan's first slot on where the host can resume from it."""
    times = len(plan.coalitions)
    samples = len(next(leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)))

    def repeated(tree: Any) -> Any:
        return tree_map_only(Tensor, lambda leaf: _repeated(leaf, samples, times), tree)

    masks = torch.tensor(plan.coalitions).repeat_interleave(samples)
    alphas = {slot: (masks >> i & 1) * torch.tensor(level) for i, (slot, level) in enumerate(plan.levels)}
    with undisturbed(grown.model), grown.override(alphas):
        if host is None:
            result = grown.model(*repeated(args))
        else:
            first = next(slot for slot in host.slot_order() if slot in alphas)
            state: State = repeated(host.forward_to(args[0], first))
            result = host.forward_from(state, first)
    return _value(*per(result, repeated(target))).unflatten(1, (times, samples)).movedim(1, 0)
