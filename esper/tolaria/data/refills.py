"""Refills of the reserve: training samples that have not been trained on yet, which say as much as the probe does.

In the first epoch the end of the training order is still to come, and in a run that ends before its first epoch does,
some of it never comes. So whole clusters are taken from the end of that order backwards, and a share of them may be
drawn until the first of its samples is trained on. Later epochs bring nothing new.
"""

import itertools

import torch
from torch import Tensor

from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.sampler import BatchPlan

MOST = 1000  # shares


class Refills:
    """The shares of a run, the last ones of the first epoch first; a pure function of its arguments.

    Args:
        bundle: the data.
        plan: the global batches.
        per_look: samples of a share, at least.

    Fields:
        shares: clusters of the training part in each share, int64.
        until: for each share, the place in the plan of batches (a step, from 0) at which a sample of it is first
            trained on; descending.
    """

    def __init__(self, bundle: Bundle, plan: BatchPlan, per_look: int) -> None:
        self.shares: list[Tensor] = []
        self.until: tuple[int, ...] = ()
        if not bundle.refills:
            return
        clusters = bundle.train_clusters
        order = plan.epoch_order(0)
        steps = torch.empty_like(order)
        steps[order] = (torch.arange(len(order)) // plan.batch).clamp(max=plan.steps_per_epoch)
        members, places = clusters.members(torch.arange(len(clusters)))
        first = torch.full((len(clusters),), plan.steps_per_epoch).scatter_reduce(0, places, steps[members], "amin")
        last_first = torch.argsort(first, descending=True, stable=True)
        sizes = clusters.sizes[last_first]
        share = (sizes.cumsum(0) - sizes) // per_look
        whole = min(int(sizes.sum()) // per_look, MOST)
        cut = torch.searchsorted(share, torch.arange(whole + 1)).tolist()
        spans = [(low, high) for low, high in itertools.pairwise(cut) if low < high]
        spans = [(low, high) for low, high in spans if int(sizes[low:high].sum()) >= per_look // 2]
        self.shares = [last_first[low:high] for low, high in spans]
        self.until = tuple(int(first[last_first[high - 1]]) for _, high in spans)
