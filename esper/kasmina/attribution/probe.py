"""The paired probe of one seed: the loss with it against the loss without, on the same samples.

It returns sums over clusters of samples, which ranks add up, so that mean, error and skewness do not depend on the
sharding. A cluster is whole on one rank.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.attribution.coalitions import Quantity, QuantityKind, make_plan
from esper.kasmina.attribution.worth import PerSample, attribute
from esper.kasmina.slots.grown import Grown


def difference_sums(
    differences: Iterable[Tensor], row: tuple[int, ...] = (), clusters: Tensor | None = None
) -> dict[str, float]:
    """Sums over clusters of paired differences d; one that is not finite is counted and left out.

    With n the number of a cluster's samples and s the sum of their d, these are the sums of
    `esper.accord.evidence.sums.ClusterSums`. A cluster that is left out whole does not count.

    Args:
        differences: of each batch, float64 [..., B], on any device.
        row: index of d in each of them, [B]; the default takes a tensor [B] as it is.
        clusters: number of each sample's cluster, from 0, int64 [N] over all batches; None: each sample is one.

    Returns:
        clusters, count, total, total_sq, total_cube, size_sq, size_cube, cross, cross_sq, cross_size; left_out, how
        many samples are not finite.
    """
    d = torch.cat([torch.zeros(0, dtype=torch.float64), *(batch[row].cpu() for batch in differences)])
    finite = torch.isfinite(d)
    n, s = finite.double(), torch.where(finite, d, 0.0)
    if clusters is not None:
        known = int(clusters.max()) + 1 if len(clusters) else 0
        n, s = (torch.zeros(known, dtype=torch.float64).index_add_(0, clusters, values) for values in (n, s))
    sums = {
        "clusters": (n > 0).double(),
        "count": n,
        "total": s,
        "total_sq": s * s,
        "total_cube": s**3,
        "size_sq": n * n,
        "size_cube": n**3,
        "cross": s * n,
        "cross_sq": s * s * n,
        "cross_size": s * n * n,
        "left_out": (~finite).double(),
    }
    totals = torch.stack([values.sum() for values in sums.values()]).tolist()
    return dict(zip(sums, totals, strict=True))


def paired_sums(
    grown: Grown,
    slot: str,
    alpha: float,
    batches: Iterable[tuple[Any, Any]],
    per_sample: PerSample,
    statistics: Iterable[tuple[Any, Any]] = (),
    *,
    clusters: Tensor | None = None,
) -> dict[str, float]:
    """Sums d = loss at alpha 0 minus loss at ``alpha``, in nats per sample; the model is left as it was.

    Args:
        grown: the model.
        slot: a slot that holds a seed.
        alpha: alpha at which the seed takes part.
        batches: as in `attribute`.
        per_sample: as in `attribute`.
        statistics: as in `attribute`.
        clusters: as in `difference_sums`.

    Returns:
        `difference_sums` of d over this rank's share of the samples.
    """
    plan, differences_Q2B = make_plan({slot: alpha}), list[Tensor]()
    row = [quantity for quantity, _ in plan.quantities].index(Quantity(QuantityKind.LEAVE_ONE_OUT, (slot,)))
    attribute(grown, plan, batches, per_sample, statistics=statistics, each=differences_Q2B.append)
    return difference_sums(differences_Q2B, (row, 0), clusters)
