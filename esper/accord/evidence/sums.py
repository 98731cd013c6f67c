"""Sums over clusters of paired differences, and the estimate that they give.

A *cluster* is a set of samples that may depend on each other: a document, a patient, a user's batch; where nothing is
said, each sample is one. Cluster i has n_i samples whose differences d (loss without the seed minus loss with it, nats)
add up to s_i. The mean is a ratio of two sums over clusters, and its error is that of a ratio (Cochran, 1977, "Sampling
Techniques", section 6.4; the CR1 estimator of Cameron and Miller, 2015, J. Human Resources 50):

    m = sum s_i / sum n_i,   e_i = s_i - m n_i,   SE = sqrt(G / (G - 1) * sum e_i^2) / sum n_i      for G clusters

with G - 1 degrees of freedom. Where each sample is a cluster this is the usual standard error. The target is the
population, so there is no finite-population correction.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from esper.leyline.evidence import ABSENT, Reading, measured

MIN_CLUSTERS = 30
"""Clusters below which a standard error over clusters is not to be trusted (Cameron and Miller, 2015, section VI)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSums:
    """Sums over clusters; n is a cluster's number of samples, s the sum of its differences in nats.

    Fields:
        clusters: number of clusters.
        count: sum of n.
        total: sum of s.
        total_sq: sum of s^2.
        total_cube: sum of s^3.
        size_sq: sum of n^2.
        size_cube: sum of n^3.
        cross: sum of s n.
        cross_sq: sum of s^2 n.
        cross_size: sum of s n^2.
    """

    clusters: int = 0
    count: int = 0
    total: float = 0.0
    total_sq: float = 0.0
    total_cube: float = 0.0
    size_sq: float = 0.0
    size_cube: float = 0.0
    cross: float = 0.0
    cross_sq: float = 0.0
    cross_size: float = 0.0

    @classmethod
    def read(cls, sums: Mapping[str, float], prefix: str) -> "ClusterSums":
        """Returns the sums whose names in ``sums`` begin with ``prefix``."""
        values = {name: float(sums[f"{prefix}{name}"]) for name in NAMES}
        return cls(**{**values, "clusters": int(values["clusters"]), "count": int(values["count"])})  # type: ignore[arg-type]

    @classmethod
    def of(cls, values: Sequence[float]) -> "ClusterSums":
        """Returns the sums in the order of the fields."""
        return cls.read(dict(zip(NAMES, values, strict=True)), "")

    def __add__(self, other: "ClusterSums") -> "ClusterSums":
        return ClusterSums(**{name: getattr(self, name) + getattr(other, name) for name in NAMES})

    def __neg__(self) -> "ClusterSums":
        """The same clusters with the sign of every difference changed."""
        odd = {name: -getattr(self, name) for name in ("total", "total_cube", "cross", "cross_size")}
        return ClusterSums(**{name: odd.get(name, getattr(self, name)) for name in NAMES})

    def named(self) -> dict[str, float]:
        """Returns the sums by name."""
        return {name: float(getattr(self, name)) for name in NAMES}

    @property
    def is_finite(self) -> bool:
        """Whether every sum is a finite number."""
        return all(math.isfinite(getattr(self, name)) for name in NAMES)


NAMES = tuple(field.name for field in fields(ClusterSums))


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """What the first looks of running evidence added up to: clusters, samples, sum of differences in nats."""

    clusters: int = 0
    count: int = 0
    total: float = 0.0

    def __neg__(self) -> "Earlier":
        return Earlier(clusters=self.clusters, count=self.count, total=-self.total)


NOTHING = Earlier()


@dataclass(frozen=True, slots=True)
class Estimate:
    """Mean difference per sample in nats, its cluster-robust standard error, skewness of e_i, number of clusters."""

    mean: float
    se: float
    skew: float
    clusters: int


def estimate(sums: ClusterSums, earlier: Earlier = NOTHING) -> Estimate | None:
    """Returns the estimate that the sums give; None with fewer than two clusters, or if a sum is not finite.

    Args:
        sums: over all clusters.
        earlier: clusters whose mean does not count; the spread about the mean and its skewness are still those of all,
            so that harm which was seen once is not forgotten.
    """
    clusters, count = sums.clusters - earlier.clusters, sums.count - earlier.count
    if clusters < 2 or count < 1 or not sums.is_finite:
        return None
    mean = (sums.total - earlier.total) / count
    second = max(0.0, sums.total_sq - 2.0 * mean * sums.cross + mean**2 * sums.size_sq)
    third = sums.total_cube - 3.0 * mean * sums.cross_sq + 3.0 * mean**2 * sums.cross_size - mean**3 * sums.size_cube
    spread = math.sqrt(second / sums.clusters)
    skew = third / sums.clusters / spread**3 if spread**3 > 0.0 else 0.0
    most = math.sqrt(sums.clusters)  # the largest skewness of so many values (all but one equal); beyond is rounding
    se = math.sqrt(second / (sums.clusters - 1.0) * clusters) / count
    return Estimate(mean, se, min(most, max(-most, skew)), clusters)


def reading_of(sums: ClusterSums, *, tick: int, min_samples: int) -> Reading:
    """Returns the estimate as a reading; absent below ``min_samples`` samples or two clusters.

    Args:
        sums: over all ranks.
        tick: control tick at which the latest of them were measured.
        min_samples: samples below which a reading is absent.
    """
    found = estimate(sums)
    if found is None or sums.count < min_samples or not math.isfinite(found.mean + found.se):
        return ABSENT
    return measured(found.mean, tick=tick, n=sums.count, se=found.se, skew=found.skew)
