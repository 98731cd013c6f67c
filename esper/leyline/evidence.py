"""Evidence: numbers that are measured (at a tick, on a number of samples), stale, or absent. Absent is never zero."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from esper.leyline.stages import Gate


class Status(StrEnum):
    """Degree to which a reading may be trusted."""

    MEASURED = "measured"
    STALE = "stale"
    ABSENT = "absent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One agreed number with its uncertainty."""

    status: Status
    """Measured, stale or absent."""

    value: float | None = None
    """The number, in the unit that its field names; None exactly when absent."""

    se: float | None = None
    """Standard error of ``value``; None where there is none."""

    skew: float | None = None
    """Sample skewness of the numbers that ``value`` is the mean of; None where it was not measured."""

    n: int = 0
    """Samples behind it."""

    tick: int | None = None
    """The control tick at which it was measured; None exactly when absent."""

    def __post_init__(self) -> None:
        if (self.status is Status.ABSENT) != (self.value is None) or (self.value is None) != (self.tick is None):
            raise ValueError(f"inconsistent reading: {self.status.value} with value={self.value!r}, tick={self.tick!r}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"a reading must be finite, got {self.value!r}")
        if self.se is not None and not (math.isfinite(self.se) and self.se >= 0.0):
            raise ValueError(f"a standard error must be finite and not negative, got {self.se!r}")
        if self.skew is not None and not math.isfinite(self.skew):
            raise ValueError(f"a skewness must be finite, got {self.skew!r}")

    @property
    def is_measured(self) -> bool:
        """True if the reading is fresh enough to decide on."""
        return self.status is Status.MEASURED

    def as_of(self, tick: int, fresh_ticks: int) -> "Reading":
        """Returns the reading as seen at ``tick``: stale if it is older than ``fresh_ticks``."""
        if self.tick is None or tick - self.tick <= fresh_ticks or self.status is Status.STALE:
            return self
        return replace(self, status=Status.STALE)

    def __str__(self) -> str:
        if self.value is None:
            return "absent"
        error = "" if self.se is None else f" ± {self.se:.4g}"
        age = f" (stale, tick {self.tick})" if self.status is Status.STALE else ""
        return f"{self.value:.4g}{error}{age}"


ABSENT = Reading(status=Status.ABSENT)


def measured(value: float, *, tick: int, n: int, se: float | None = None, skew: float | None = None) -> Reading:
    """Returns a fresh reading; see `Reading` for the arguments."""
    return Reading(status=Status.MEASURED, value=value, se=se, skew=skew, n=n, tick=tick)


def estimate_mean(
    n: int, total: float, total_sq: float, *, tick: int, min_samples: int, total_cube: float | None = None
) -> Reading:
    """Returns the mean of one number per sample, such as a paired difference, and its standard error, from sums.

    With d_i the number of sample i and S1, S2, S3 the sums of d_i, d_i^2 and d_i^3: the mean is m = S1/n,
    SE = sqrt((S2 - S1^2/n) / (n (n - 1))), and the skewness is (S3/n - 3 m S2/n + 2 m^3) / v^1.5 with v = S2/n - m^2,
    or 0 if all d_i are equal. Since these are sums over samples, the result does not depend on how samples were
    sharded.

    Args:
        n: number of samples on all ranks.
        total: sum of d_i over all ranks.
        total_sq: sum of squares of d_i over all ranks.
        tick: control tick at which they were summed.
        min_samples: with fewer samples the standard error cannot be trusted, and the reading is absent.
        total_cube: sum of cubes of d_i over all ranks; None leaves out the skewness.
    """
    if n < max(2, min_samples) or not all(map(math.isfinite, (total, total_sq, total_cube or 0.0))):
        return ABSENT
    variance = max(0.0, (total_sq - total * total / n) / (n - 1))
    skew = None if total_cube is None else _skewness(n, total, total_sq, total_cube)
    return measured(total / n, tick=tick, n=n, se=math.sqrt(variance / n), skew=skew)


def _skewness(n: int, total: float, total_sq: float, total_cube: float) -> float:
    mean = total / n
    spread = math.sqrt(max(0.0, total_sq / n - mean * mean))
    third = total_cube / n - 3.0 * mean * total_sq / n + 2.0 * mean**3
    if spread**3 == 0.0:
        return 0.0
    most = math.sqrt(n)  # the largest skewness of n values (all but one equal); anything beyond it is rounding
    return min(most, max(-most, third / spread**3))


def estimate_deviation(n: int, total: float, total_sq: float, *, tick: int) -> Reading:
    """Returns the standard deviation of n numbers from their sums, sqrt((S2 - S1^2/n) / (n - 1)); absent if n < 2."""
    mean = estimate_mean(n, total, total_sq, tick=tick, min_samples=2)
    return ABSENT if mean.se is None else measured(mean.se * math.sqrt(n), tick=tick, n=n)


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientHealth:
    """Health of one owner's gradient, the host's or a seed's, since the last tick."""

    vanishing: Reading = ABSENT
    """Share of the owner's parameters, 0 to 1, in tensors whose gradient RMS is below ``optim.vanishing_rms``; mean
    over the sampled steps.
    """

    exploding: Reading = ABSENT
    """Share of the owner's parameters, 0 to 1, in tensors whose gradient RMS is above ``optim.exploding_rms``; mean
    over the sampled steps.
    """

    nans: int = 0
    """Tensors whose gradient had a NaN, over all steps; with a fused optimizer, steps in which some had."""

    infs: int = 0
    """The same of tensors whose gradient had no NaN but an infinity, or a norm beyond its format."""

    moved: Reading = ABSENT
    """Share of a seed's numbers, 0 to 1, that an optimizer step changed as they are stored; mean over the sampled
    steps. Near 0 a half-precision seed stands still, however healthy its gradient. Absent for the host.
    """

    gradient_rms: Reading = ABSENT
    """The owner's mean gradient norm over the root of how many of its parameters have a gradient, before clipping."""

    update_rms: Reading = ABSENT
    """Root mean square of what an optimizer step changed in a seed, mean over the sampled steps. Absent for the host,
    of which nothing may depend on its seeds.
    """

    host_update_rms: Reading = ABSENT
    """The same of the host in the same steps, as a seed's yardstick; absent for the host itself."""

    def as_of(self, tick: int, fresh_ticks: int) -> "GradientHealth":
        """Returns the health as seen at ``tick``; see `Reading.as_of`."""
        names = ("vanishing", "exploding", "moved", "gradient_rms", "update_rms", "host_update_rms")
        return replace(self, **{name: getattr(self, name).as_of(tick, fresh_ticks) for name in names})


NO_HEALTH = GradientHealth()

EXACT_SEEDS = 4
"""Seeds up to which Shapley values are exact: 2^4 forwards."""

WORTH_PAIRS = 8
"""Drawn orders of joining, each with its reverse, from which Shapley values of more than four seeds are taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedWorth:
    """What one seed saves of the loss on held-out samples, in nats per sample; positive helps."""

    solo: Reading = ABSENT
    """With this seed alone, against no seed."""

    leave_one_out: Reading = ABSENT
    """With all seeds, against all but this one: how much the others rely on it."""

    shapley: Reading = ABSENT
    """Its share where seeds overlap: its mean gain over all orders of joining. The shares sum to all seeds' worth."""

    def as_of(self, tick: int, fresh_ticks: int) -> "SeedWorth":
        """Returns the worth as seen at ``tick``; see `Reading.as_of`."""
        return SeedWorth(
            solo=self.solo.as_of(tick, fresh_ticks),
            leave_one_out=self.leave_one_out.as_of(tick, fresh_ticks),
            shapley=self.shapley.as_of(tick, fresh_ticks),
        )


NO_WORTH = SeedWorth()


@dataclass(frozen=True, slots=True)
class Check:
    """One question of a gate and its answer."""

    name: str
    """Name of the question."""

    passed: bool
    """The answer."""

    detail: str
    """What was measured, in words."""

    integrity: bool = False
    """Whether it binds every controller; checks of evidence bind under gates.evidence=enforce only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """Verdict of a gate: a pure function of evidence."""

    gate: Gate
    """Which gate."""

    passed: bool
    """Every binding check passed."""

    score: float
    """Share of checks that passed, 0 to 1."""

    checks: tuple[Check, ...]
    """Each question with its answer, in order."""

    @property
    def reason(self) -> str:
        """The failed checks in one line, or 'passed'."""
        failed = [f"{check.name}: {check.detail}" for check in self.checks if not check.passed]
        return "; ".join(failed) if failed else "passed"
