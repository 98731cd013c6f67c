"""Robust statistics that tell whether a loss is out of line with those before it, on the loss's own scale.

    jump       loss > median + max(deviations * 1.4826 * MAD, rise * chance)      of the losses of healthy ticks
    blow-up    training loss > blowup * max(chance, least loss so far)
    collapse   training loss >= collapse * chance, though the median had once been < clearly_better * chance
    and each   loss > median + errors * (standard error of loss - median)

The median absolute deviation (MAD) is a measure of spread that outliers cannot spoil while they are less than half of
the numbers (Hampel 1974); times 1.4826 it equals the standard deviation of normal noise. It covers everything that the
loss does from tick to tick, trend and noise alike: a loss that falls fast, or wavers, widens its own limit. ``chance``
is the entropy of the targets, the loss of a network that knows their frequencies and nothing else: log(classes) if
classes are balanced. A rise below a share of it is never a panic, however smooth the curve had been. A loss that climbs
slowly widens its limit as it climbs; blow-up and collapse catch it, since they compare with chance. They look at the
training loss alone, because a network that memorises may well do worse than chance on samples that it has not seen.

Where a class is rare, chance is small and a tick's loss hangs on a handful of samples. So a loss is out of line only if
sampling does not explain it: the last rule compares with the standard error of the mean of this tick's samples, and
that of the median, 1.2533 * rms(errors) / sqrt(ticks). A handful of samples cannot lift the mean of all beyond
blowup times an even guess between two classes (or chance, if more), so there no error is an excuse.

Where no chance level is known, or losses are negative (a density), the network's own progress takes its place: from
the first median of the training (a chance level of its own) down to the lowest (its zero). A collapse is not judged
then. Scaling losses and ``chance`` together changes no verdict; a higher loss is never judged better than a lower one.
All functions are pure. What a row of ticks out of line means is said in `esper.accord.course`.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from esper.accord.governor.config import GovernorConfig

_EVEN = math.log(2)  # nats: the loss of an even guess between two classes
_OF_MEDIAN = 1.2533  # sqrt(pi / 2): standard error of a median, in those of a mean of the same numbers


class Verdict(StrEnum):
    """Verdict on one tick. SUSPECT: the tick is out of line, but not yet for long enough to act."""

    HEALTHY = "HEALTHY"
    SUSPECT = "SUSPECT"
    PANIC = "PANIC"


class Symptom(StrEnum):
    """The trouble with a tick; NONE if there is none. SHIFT: the loss has come to rest higher than it was, in a healthy
    tick."""

    NONE = "NONE"
    NONFINITE = "NONFINITE"
    DIVERGENCE = "DIVERGENCE"
    COLLAPSE = "COLLAPSE"
    SHIFT = "SHIFT"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Losses of healthy ticks, in nats, and of those out of line since then.

    Fields:
        losses: the latest ones of healthy ticks, newest last.
        errors: standard error of each of ``losses``; 0 where there is none.
        row: losses out of line since the last one in line, newest last.
        row_errors: standard error of each of ``row``.
        start: first median; None while there are too few.
        best: lowest median that they ever had; None while there are too few.
        least: lowest loss of all; None before the first one.
    """

    losses: tuple[float, ...] = ()
    errors: tuple[float, ...] = ()
    row: tuple[float, ...] = ()
    row_errors: tuple[float, ...] = ()
    start: float | None = None
    best: float | None = None
    least: float | None = None


@dataclass(frozen=True, slots=True)
class Scale:
    """The two losses that others are measured by: ``floor`` of a perfect network, ``chance`` of one that guesses."""

    floor: float
    chance: float

    @property
    def span(self) -> float:
        """Nats between them."""
        return self.chance - self.floor

    def at(self, share: float) -> float:
        """The loss at a share of the way from the floor to chance."""
        return self.floor + share * self.span


def chance_level(targets: Iterable[int]) -> float:
    """Returns the entropy of the targets' frequencies, in nats; 0 if all targets are the same."""
    counts: dict[int, int] = {}
    for target in targets:
        counts[target] = counts.get(target, 0) + 1
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def deviation(losses: Sequence[float]) -> float:
    """Returns 1.4826 times the median absolute deviation from the median."""
    middle = statistics.median(losses)
    return 1.4826 * statistics.median(abs(loss - middle) for loss in losses)


def knows_chance(series: Series, chance: float) -> bool:
    """Returns whether ``chance`` is a level that this loss can be measured by: it is positive, and no loss negative."""
    return chance > 0 and (series.least is None or series.least >= 0)


def scale_of(series: Series, chance: float) -> Scale | None:
    """Returns what losses are measured by; None if that is not known yet."""
    if knows_chance(series, chance):
        return Scale(0.0, chance)
    if series.start is None or series.best is None:
        return None
    return Scale(series.best, series.start)


def _inexcusable(series: Series, chance: float, config: GovernorConfig) -> float:
    """Returns the loss beyond which it is no handful of samples, whatever the standard error; infinite if unknown."""
    if knows_chance(series, chance):
        return config.blowup * max(chance, series.least or 0.0, _EVEN)
    scale = scale_of(series, chance)
    return math.inf if scale is None else scale.at(config.blowup**2)


def sampling_limit(series: Series, chance: float, config: GovernorConfig, *, error: float) -> float:
    """Returns the loss up to which sampling alone may explain it. See `jump_limit`."""
    squares = sum(one * one for one in series.errors)
    count = len(series.losses)
    of_median = _OF_MEDIAN * math.sqrt(squares) / count  # sqrt(squares / count), the rms, over sqrt(count)
    explained = statistics.median(series.losses) + config.errors * math.hypot(error, of_median)
    return min(explained, _inexcusable(series, chance, config))


def bare_limit(series: Series, chance: float, config: GovernorConfig) -> float | None:
    """Returns the training loss that a network without its seed should not exceed either; None if it is not known.

    After a blended seed has gone there are no losses to compare with, and chance alone says what is hopeless.
    """
    known = series.least is not None and not series.losses and knows_chance(series, chance)
    return _inexcusable(series, chance, config) if known else None


def without_past(series: Series) -> Series:
    """Returns the series of a network that has just lost a blended seed, or some of its alpha: it begins anew, but for
    the lowest loss, by which a blow-up is measured. A row that began before goes on."""
    return series if series.row else Series(least=series.least)


def jump_limit(series: Series, chance: float, config: GovernorConfig, *, error: float = 0.0) -> float | None:
    """Returns the loss above which the next one is a jump; None while there are too few losses to tell.

    Args:
        series: losses of the healthy ticks before.
        chance: loss at chance level in nats, see `chance_level`.
        config: settings of the governor.
        error: standard error of the next loss.
    """
    if len(series.losses) < config.min_history:
        return None
    noise = config.deviations * deviation(series.losses)
    scale = scale_of(series, chance)
    rise = 0.0 if scale is None else config.rise * scale.span
    return max(statistics.median(series.losses) + max(noise, rise), sampling_limit(series, chance, config, error=error))


def blowup_limit(series: Series, chance: float, config: GovernorConfig, *, error: float = 0.0) -> float | None:
    """Returns the loss above which the next one has blown up; None if that is not known yet. See `jump_limit`."""
    scale = scale_of(series, chance)
    if series.least is None or scale is None:
        return None
    if knows_chance(series, chance):
        most: float | None = config.blowup * max(chance, series.least)
    else:
        # A network that has learned little yet gives a small span, so that noise must be left out besides.
        jump = jump_limit(series, chance, config)
        most = None if jump is None else max(jump, scale.at(config.blowup))
    return None if most is None else max(most, sampling_limit(series, chance, config, error=error))


def ceiling(
    series: Series, chance: float, config: GovernorConfig, *, training: bool, error: float = 0.0
) -> float | None:
    """Returns the loss above which the next one is a divergence, by jump or by blow-up; None if that is not known
    yet."""
    jump = jump_limit(series, chance, config, error=error)
    blowup = blowup_limit(series, chance, config, error=error) if training else None
    known = [limit for limit in (jump, blowup) if limit is not None]
    return min(known, default=None)


def has_collapsed(series: Series, loss: float, chance: float, config: GovernorConfig, *, error: float = 0.0) -> bool:
    """Returns whether a network that once was clearly better than chance has fallen back to chance."""
    if not knows_chance(series, chance) or series.best is None or series.best >= config.clearly_better * chance:
        return False
    return loss >= config.collapse * chance and loss > sampling_limit(series, chance, config, error=error)


def symptom_of(
    series: Series, loss: float, chance: float, config: GovernorConfig, *, training: bool, error: float = 0.0
) -> Symptom:
    """Returns what is wrong with one finite loss.

    Args:
        series: losses of the healthy ticks before.
        loss: the loss to judge, in nats per sample.
        chance: loss at chance level in nats, see `chance_level`.
        config: settings of the governor.
        training: whether it is the training loss, which is also compared with chance.
        error: standard error of ``loss``; 0 where there is none.
    """
    if not series.losses:
        bare = bare_limit(series, chance, config) if training else None
        return Symptom.NONE if bare is None or loss <= bare else Symptom.DIVERGENCE
    if loss <= sampling_limit(series, chance, config, error=error):  # which every rule asks for; seldom passed
        return Symptom.NONE
    most = ceiling(series, chance, config, training=training, error=error)
    if most is not None and loss > most:
        return Symptom.DIVERGENCE
    collapsed = training and has_collapsed(series, loss, chance, config, error=error)
    return Symptom.COLLAPSE if collapsed else Symptom.NONE


def append_loss(series: Series, loss: float, config: GovernorConfig, *, error: float = 0.0) -> Series:
    """Returns the series with the loss of one more healthy tick; whatever was out of line before is over."""
    losses, errors = (*series.losses, loss)[-config.history :], (*series.errors, error)[-config.history :]
    least = loss if series.least is None else min(series.least, loss)
    after = replace(series, losses=losses, errors=errors, least=least, row=(), row_errors=())
    if len(losses) < config.min_history:
        return after
    middle = statistics.median(losses)
    return replace(
        after,
        start=middle if series.start is None else series.start,
        best=middle if series.best is None else min(series.best, middle),
    )


def append_outlier(series: Series, loss: float, config: GovernorConfig, *, error: float = 0.0) -> Series:
    """Returns the series with one more loss that is out of line."""
    row, errors = (*series.row, loss)[-config.history :], (*series.row_errors, error)[-config.history :]
    return replace(series, row=row, row_errors=errors)


def accept_row(series: Series, config: GovernorConfig) -> Series:
    """Returns the series begun anew from the end of its row; what the network had reached before is kept."""
    rest = -config.patience - 1
    return replace(series, losses=series.row[rest:], errors=series.row_errors[rest:], row=(), row_errors=())
