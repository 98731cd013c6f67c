"""The paired probe of one seed: the loss with it against the loss without, on the same samples.

What comes out are sums over samples, so that ranks add them up and mean, error and skewness do not depend on sharding.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.attribution.coalitions import Quantity, QuantityKind, make_plan
from esper.kasmina.attribution.worth import PerSample, attribute
from esper.kasmina.slots.grown import Grown


def paired_sums(
    grown: Grown, slot: str, alpha: float, batches: Iterable[tuple[Any, Any]], per_sample: PerSample
) -> dict[str, float]:
    """Sums of d = loss at alpha 0 minus loss at ``alpha``, in nats per sample; the model is left as it was.

    Args:
        slot: holds a seed. batches, per_sample: as in `attribute`.

    Returns:
        count, and sum, sum_sq, sum_cube of d over this rank's share of the samples.
    """
    plan, cubes = make_plan({slot: alpha}), torch.zeros((), dtype=torch.float64)
    row = [quantity for quantity, _ in plan.quantities].index(Quantity(QuantityKind.LEAVE_ONE_OUT, (slot,)))

    def cube(d_Q2B: Tensor) -> None:
        nonlocal cubes
        cubes = cubes.to(d_Q2B.device) + (d_Q2B[row, 0] ** 3).sum()

    sums = attribute(grown, plan, batches, per_sample, each=cube)
    total, squares, _, _ = sums.moments[row]
    return {"count": float(sums.samples), "sum": total, "sum_sq": squares, "sum_cube": float(cubes)}
