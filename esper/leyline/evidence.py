"""Evidence is measured (when, on how many samples), stale, or absent. Absent is never zero."""

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from esper.leyline.stages import Gate


class Status(StrEnum):
    """How much a reading may be trusted."""

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
        """Fresh enough to decide on."""
        return self.status is Status.MEASURED

    def aged(self, tick: int, fresh_ticks: int) -> "Reading":
        """The same reading as seen at ``tick``: stale once older than ``fresh_ticks``."""
        if self.tick is None or tick - self.tick <= fresh_ticks or self.status is Status.STALE:
            return self
        return replace(self, status=Status.STALE)

    def __str__(self) -> str:
        if self.value is None:
            return "absent"
        error = "" if self.se is None else f" ± {self.se:.4g}"
        old = f" (stale, tick {self.tick})" if self.status is Status.STALE else ""
        return f"{self.value:.4g}{error}{old}"


ABSENT = Reading(status=Status.ABSENT)


def measured(value: float, *, tick: int, n: int, se: float | None = None, skew: float | None = None) -> Reading:
    """A fresh reading; see `Reading` for units."""
    return Reading(status=Status.MEASURED, value=value, se=se, skew=skew, n=n, tick=tick)


def paired(
    n: int, total: float, total_sq: float, *, tick: int, min_samples: int, total_cube: float | None = None
) -> Reading:
    """Mean and standard error of paired differences from their sums.

    With d_i the difference of sample i: mean m = S1/n, SE = sqrt((S2 - S1^2/n) / (n (n - 1))), and the skewness is
    (S3/n - 3 m S2/n + 2 m^3) / v^1.5 with v = S2/n - m^2, 0 where nothing varies.
    Sums over samples make the result independent of how samples were sharded.

    Args:
        n, total, total_sq, total_cube: count, sum, sum of squares and of cubes of d_i over all ranks.
        tick: when they were summed.
        min_samples: below it the standard error is not trusted and the reading is absent.
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
    most = math.sqrt(n)  # no sample of n has more (all but one value equal); what exceeds it is rounding
    return min(most, max(-most, third / spread**3))


def spread(n: int, total: float, total_sq: float, *, tick: int) -> Reading:
    """Standard deviation of n numbers from their sums, sqrt((S2 - S1^2/n) / (n - 1)); absent below two."""
    mean = paired(n, total, total_sq, tick=tick, min_samples=2)
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
    """Tensors whose gradient had a NaN, over all steps."""

    infs: int = 0
    """Tensors whose gradient had no NaN but an infinity, or a norm beyond its format, over all steps."""

    def aged(self, tick: int, fresh_ticks: int) -> "GradientHealth":
        """The same as seen at ``tick``; see `Reading.aged`."""
        return replace(
            self, vanishing=self.vanishing.aged(tick, fresh_ticks), exploding=self.exploding.aged(tick, fresh_ticks)
        )


NO_HEALTH = GradientHealth()


@dataclass(frozen=True, slots=True)
class Check:
    """One question of a gate and its answer."""

    name: str
    """Name of the question."""

    passed: bool
    """The answer."""

    detail: str
    """What was measured, in words."""

    integrity: bool
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
