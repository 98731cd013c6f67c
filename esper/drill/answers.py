"""Answers of probes where no network is measured."""

from collections.abc import Sequence


def sums_of(gains: Sequence[int]) -> dict[str, int]:
    """Sums over samples that are a cluster each, as a probe sends them."""
    first, second, third = (sum(gain**power for gain in gains) for power in (1, 2, 3))
    sizes = dict.fromkeys(("clusters", "count", "size_sq", "size_cube"), len(gains))
    cross = {"cross": first, "cross_size": first, "cross_sq": second}
    return {**sizes, **cross, "total": first, "total_sq": second, "total_cube": third}
