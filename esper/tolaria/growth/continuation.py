"""Continues a network in throw-away copies, with one seed and without it: what would the host have learned by itself?

    for each order of batches, for each of {with, without}
        copy model and optimizer  ->  n1 steps  ->  losses of the probe  ->  n2 - n1 steps  ->  losses  ->  dropped

Both copies of a pair take the same batches under the same random stream. No rank talks to another: every rank takes
the same steps and then judges its own share of the probe. Weights, moments, statistics and random streams of the
network that trains are left as they are. One copy of the model and its moments lives at a time.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.export.copying import computed_tensors
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.phases import Phase
from esper.kasmina.streams import undisturbed
from esper.leyline.errors import one_line
from esper.nissa.lane import say
from esper.tolaria.growth.ownership import ParameterOwner

Learn = Callable[[Grown, Any], Tensor]
"""The mean training loss of a batch, 0-D, by a model that is in train()."""
Judge = Callable[[Grown], Tensor]
"""The loss of each probe sample of this rank, [N]."""
Continue = Callable[[Sequence[Any], bool], Tensor]
"""The losses at both marks after these batches, with the seed or without it, float64 [2, N]."""


def copy_owner(owner: ParameterOwner) -> ParameterOwner:
    """A copy of an optimizer's owner with its model; regions that were compiled run eagerly in it."""
    made = copy.deepcopy(owner, computed_tensors(owner.grown.model))
    for holder in made.grown.slots.values():
        holder.region = None
    return made


def continue_network(
    owner: ParameterOwner,
    slot: str,
    batches: Sequence[Any],
    marks: tuple[int, int],
    *,
    keep: bool,
    learn: Learn,
    judge: Judge,
    learn_steps: Mapping[str, int | None],
    step: int,
    seed: int,
    scale: float = 1.0,
) -> Tensor:
    """Trains a copy for the further steps, with the seed of a slot or without it.

    Args:
        owner: of the network that trains.
        slot: the slot that holds the seed.
        batches: of the further steps, one each.
        marks: n1 < n2, steps after which the probe is judged; n2 = len(batches).
        keep: whether the seed takes part.
        learn, judge: see `Learn` and `Judge`.
        learn_steps: per slot, the first step in which its seed learned; None while it does not (for its rate).
        step: optimizer step of the first batch.
        seed: of the random streams in both copies of a pair.
        scale: factor of the loss in backward, for half precision.

    Returns:
        The losses at both marks, float64 [2, N].
    """
    made = copy_owner(owner)
    if not keep:
        made.release(slot)
        made.grown.slots[slot].uproot()
    for other, holder in made.grown.slots.items():
        if holder.seed is not None and holder.phase is Phase.OFF:  # it learns in shadows, which copies do without
            made.set_learning(other, False)
    losses = []
    with undisturbed(made.grown.model, seed=seed):
        for index, batch in enumerate(batches):
            made.set_lr(step + index, learn_steps)
            (learn(made.grown, batch) * scale).backward()
            if scale != 1.0:
                for parameter in made.grown.model.parameters():
                    if parameter.grad is not None:
                        parameter.grad.div_(scale)
            made.step()
            if index + 1 in marks:
                losses.append(judge(made.grown).double().cpu())
    return torch.stack(losses)


def continued_sums(
    continue_once: Continue, orders: Sequence[Sequence[Any]], clusters: Tensor | None
) -> dict[str, float]:
    """Sums of this rank over two orders of batches; an error of the copies is told and gives no evidence.

    Args:
        continue_once: continues the network over the batches, with the seed (True) or without it; see
            `continue_network`.
        orders: two orders of the same batches.
        clusters: as in `lasting_sums`.
    """
    try:
        pairs = [(continue_once(batches, True), continue_once(batches, False)) for batches in orders]
    except Exception as error:  # of the model, the optimizer or memory: copies are no reason to end a run
        say(f"a network could not be continued in copies ({one_line(error)}); gates.baseline=standing does without")
        return {"nonfinite": 1.0}
    return lasting_sums(pairs, clusters)


def lasting_sums(losses: Sequence[tuple[Tensor, Tensor]], clusters: Tensor | None = None) -> dict[str, float]:
    """The sums of `esper.accord.evidence.lasting.NAMES` over this rank's share of the probe.

    Args:
        losses: of two orders of batches, the losses with the seed and without it, float64 [2, N] each.
        clusters: number of each sample's cluster, from 0, int64 [N]; None: each sample is one.

    Returns:
        Sums over samples whose losses are all finite; ``left_out``, how many are not.
    """
    a_2N, b_2N = (without - kept for kept, without in losses)
    finite_N = torch.isfinite(a_2N).all(0) & torch.isfinite(b_2N).all(0)
    a_2N, b_2N = torch.where(finite_N, a_2N, 0.0), torch.where(finite_N, b_2N, 0.0)
    half1, half2 = ((a_2N - b_2N) / 2).sum(1).tolist()
    host_2N = torch.stack([without for _, without in losses]).mean(0)
    host1, host2 = torch.where(finite_N, host_2N, 0.0).sum(1).tolist()
    (s1, s2), n = (a_2N + b_2N) / 2, finite_N.double()
    if clusters is not None:
        known = int(clusters.max()) + 1 if len(clusters) else 0
        s1, s2, n = (torch.zeros(known, dtype=torch.float64).index_add_(0, clusters, values) for values in (s1, s2, n))
    sums = {
        "clusters": (n > 0).double(),
        "count": n,
        "sum1": s1,
        "sum2": s2,
        "sq1": s1 * s1,
        "sq2": s2 * s2,
        "cross": s1 * s2,
        "size1": s1 * n,
        "size2": s2 * n,
        "size_sq": n * n,
    }
    totals = {name: float(values.sum()) for name, values in sums.items()}
    totals |= {"half1": half1, "half2": half2, "host1": host1, "host2": host2}
    return totals | {"left_out": float((~finite_N).sum())}
