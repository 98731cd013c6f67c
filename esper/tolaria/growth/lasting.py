"""What a rank says of copies that were continued with a seed and without it: sums over its share of the probe."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
