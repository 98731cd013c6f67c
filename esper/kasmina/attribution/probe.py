"""The paired probe of one seed: the loss with it against the loss without, on the same samples.

It returns sums over samples, which ranks add up, so that mean, error and skewness do not depend on the sharding.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.attribution.coalitions import Quantity, QuantityKind, make_plan
from esper.kasmina.attribution.worth import PerSample, attribute
from esper.kasmina.slots.grown import Grown


def difference_sums(differences: Iterable[Tensor], row: tuple[int, ...] = ()) -> dict[str, float]:
    """Sums over samples of paired differences d; one that is not finite is counted and left out.

    Args:
        differences: of each batch, float64 [..., B], on any device.
        row: index of d in each of them, [B]; the default takes a tensor [B] as it is.

    Returns:
        count, and sum, sum_sq, sum_cube of d over those that are finite; left_out, how many are not.
    """
    total = torch.zeros(4, dtype=torch.float64)
    count = 0
    for batch in differences:
        # The whole tensor is summed and the row taken then: on a GPU the order of additions depends on the shape.
        finite = torch.isfinite(batch[row])
        batch = torch.where(finite, batch, 0.0)
        moments = [batch.sum(-1)[row], (batch * batch).sum(-1)[row], (batch[row] ** 3).sum(), (~finite).sum()]
        total = total.to(batch.device) + torch.stack(moments)
        count += batch.shape[-1]
    *moments, left_out = total.tolist()
    sums = dict(zip(("sum", "sum_sq", "sum_cube"), moments, strict=True))
    return {"count": count - left_out, **sums, "left_out": left_out}


def paired_sums(
    grown: Grown,
    slot: str,
    alpha: float,
    batches: Iterable[tuple[Any, Any]],
    per_sample: PerSample,
    statistics: Iterable[tuple[Any, Any]] = (),
) -> dict[str, float]:
    """Sums d = loss at alpha 0 minus loss at ``alpha``, in nats per sample; the model is left as it was.

    Args:
        grown: the model.
        slot: a slot that holds a seed.
        alpha: alpha at which the seed takes part.
        batches: as in `attribute`.
        per_sample: as in `attribute`.
        statistics: as in `attribute`.

    Returns:
        `difference_sums` of d over this rank's share of the samples.
    """
    plan, differences_Q2B = make_plan({slot: alpha}), list[Tensor]()
    row = [quantity for quantity, _ in plan.quantities].index(Quantity(QuantityKind.LEAVE_ONE_OUT, (slot,)))
    attribute(grown, plan, batches, per_sample, statistics=statistics, each=differences_Q2B.append)
    return difference_sums(differences_Q2B, (row, 0))
