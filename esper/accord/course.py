"""What a row of losses out of line means: wait, tell of a shift, or go back.

    blow-up, collapse         a panic after ``patience`` ticks that do not fall
    a blow-up, a seed gone    a panic after three times as many that do not fall: a host may begin there
    a jump beyond chance      a panic after twice as many: the spike of a warm-up rises, and falls
    a jump below chance       told as a shift once it is at rest, after ``patience`` ticks; a panic if it has risen
                              without a pause for twice as many
    a jump of validation      told likewise; a panic only beyond blow-up, after twice as many ticks

A task that becomes harder, an augmentation that sets in, a network that memorises: each lifts a loss, and none of them
is cured by going back. A tick *falls* if its loss is lower than the one before by at least ``_FALL`` of what that
exceeds the median by (chance, where there is no median), unless the row had blown up. All functions are pure.
"""

import math
import statistics
from enum import StrEnum

from esper.accord.governor.config import GovernorConfig
from esper.accord.verdict import Series, blowup_limit, deviation, has_collapsed, scale_of

_FALL = 0.1


class Course(StrEnum):
    """What to do about a row of losses out of line."""

    WAIT = "WAIT"
    SHIFT = "SHIFT"
    PANIC = "PANIC"


def rises(series: Series, at: int, chance: float, config: GovernorConfig) -> bool:
    """Returns whether one loss of the row is higher than that before it, by more than noise, sampling, and a share of
    chance.

    Args:
        series: losses, with a row.
        at: index into the row, from 1.
        chance: loss at chance level in nats.
        config: settings of the governor.
    """
    scale = scale_of(series, chance)
    noise = config.deviations * deviation(series.losses) if series.losses else 0.0
    rise = 0.0 if scale is None else config.rise * scale.span
    sampling = config.errors * math.hypot(series.row_errors[at], series.row_errors[at - 1])
    return series.row[at] - series.row[at - 1] > max(noise, rise, sampling)


def _falls(series: Series, at: int, chance: float) -> bool:
    """Returns whether one loss of the row gives back a share of what the one before exceeded the median by."""
    before, now = series.row[at - 1], series.row[at]
    return before - now >= _FALL * (before - (statistics.median(series.losses) if series.losses else chance))


def course_of(series: Series, chance: float, config: GovernorConfig, *, training: bool) -> Course:
    """Returns what to do about a row.

    Args:
        series: losses of one kind, with a row whose newest loss is this tick's.
        chance: loss at chance level in nats, see `esper.accord.verdict.chance_level`.
        config: settings of the governor.
        training: whether it is the training loss; validation alone is hardly ever a reason to go back.
    """
    loss, error, count, patience = series.row[-1], series.row_errors[-1], len(series.row), config.patience
    falls = [_falls(series, at, chance) for at in range(1, count)]
    if not series.losses:
        return Course.PANIC if count - sum(falls) >= 3 * patience else Course.WAIT
    scale = scale_of(series, chance)
    blown = [_has_blown_up(series, at, chance, config) for at in range(count)]
    collapsed = training and has_collapsed(series, loss, chance, config, error=error)
    still = count if any(blown) else count - sum(falls)
    if blown[-1] or collapsed:
        return Course.PANIC if still >= (patience if training else 2 * patience) else Course.WAIT
    if training and scale is not None and loss >= scale.chance:
        return Course.PANIC if still >= 2 * patience else Course.WAIT
    if count <= patience or falls[-1]:
        return Course.WAIT
    if not rises(series, count - 1, chance, config):
        return Course.SHIFT
    if not training or count < 2 * patience:
        return Course.WAIT
    without_pause = all(rises(series, at, chance, config) for at in range(count - 2 * patience + 1, count))
    return Course.PANIC if without_pause else Course.WAIT


def _has_blown_up(series: Series, at: int, chance: float, config: GovernorConfig) -> bool:
    limit = blowup_limit(series, chance, config, error=series.row_errors[at])
    return limit is not None and series.row[at] > limit
