"""Robust statistics that tell whether a loss is out of line with those before it, on the loss's own scale.

    jump       loss > median + max(deviations * 1.4826 * MAD, rise * chance)      of the losses of healthy ticks
    blow-up    training loss > blowup * max(chance, least loss so far)
    collapse   training loss >= collapse * chance, though the median had once been < clearly_better * chance

The median absolute deviation (MAD) is a measure of spread that outliers cannot spoil while they are less than half of
the numbers (Hampel 1974); times 1.4826 it equals the standard deviation of normal noise. It covers everything that the
loss does from tick to tick, trend and noise alike: a loss that falls fast, or wavers, widens its own limit. ``chance``
is the entropy of the targets, the loss of a network that knows their frequencies and nothing else: log(classes) if
classes are balanced. A rise below a share of it is never a panic, however smooth the curve had been. A loss that climbs
slowly widens its limit as it climbs; blow-up and collapse catch it, since they compare with chance. They look at the
training loss alone, because a network that memorises may well do worse than chance on samples that it has not seen.
Scaling losses and ``chance`` together changes no verdict; a higher loss is never judged better than a lower one. All
functions are pure.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from esper.accord.config import GovernorConfig


class Verdict(StrEnum):
    """Verdict on one tick. SUSPECT: the tick is out of line, but not yet for long enough to act."""

    HEALTHY = "HEALTHY"
    SUSPECT = "SUSPECT"
    PANIC = "PANIC"


class Symptom(StrEnum):
    """The trouble with a tick; NONE if it is healthy."""

    NONE = "NONE"
    NONFINITE = "NONFINITE"
    DIVERGENCE = "DIVERGENCE"
    COLLAPSE = "COLLAPSE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Losses of healthy ticks, in nats.

    Fields:
        losses: the latest ones, newest last.
        best: lowest median that they ever had; None while there are too few.
        least: lowest loss of all; None before the first one.
    """

    losses: tuple[float, ...] = ()
    best: float | None = None
    least: float | None = None


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


def jump_limit(series: Series, chance: float, config: GovernorConfig) -> float | None:
    """Returns the loss above which the next one is a jump; None while there are too few losses to tell."""
    if len(series.losses) < config.min_history:
        return None
    noise = config.deviations * deviation(series.losses)
    return statistics.median(series.losses) + max(noise, config.rise * chance)


def ceiling(series: Series, chance: float, config: GovernorConfig, *, training: bool) -> float | None:
    """Returns the loss above which the next one is a divergence, by jump or by blow-up; None if that is not known
    yet."""
    jump = jump_limit(series, chance, config)
    if not training or series.least is None:
        return jump
    blowup = config.blowup * max(chance, series.least)
    return blowup if jump is None else min(jump, blowup)


def has_collapsed(series: Series, loss: float, chance: float, config: GovernorConfig) -> bool:
    """Returns whether a network that once was clearly better than chance has fallen back to chance."""
    was_better = series.best is not None and series.best < config.clearly_better * chance
    return was_better and loss >= config.collapse * chance


def symptom_of(series: Series, loss: float, chance: float, config: GovernorConfig, *, training: bool) -> Symptom:
    """Returns what is wrong with one finite loss.

    Args:
        series: losses of the healthy ticks before.
        loss: the loss to judge, in nats per sample.
        chance: loss at chance level in nats, see `chance_level`.
        config: settings of the governor.
        training: whether it is the training loss, which is also compared with chance.
    """
    most = ceiling(series, chance, config, training=training)
    if most is not None and loss > most:
        return Symptom.DIVERGENCE
    return Symptom.COLLAPSE if training and has_collapsed(series, loss, chance, config) else Symptom.NONE


def append_loss(series: Series, loss: float, config: GovernorConfig) -> Series:
    """Returns the series with the loss of one more healthy tick."""
    losses = (*series.losses, loss)[-config.history :]
    least = loss if series.least is None else min(series.least, loss)
    if len(losses) < config.min_history:
        return Series(losses=losses, best=series.best, least=least)
    middle = statistics.median(losses)
    return Series(losses=losses, best=middle if series.best is None else min(series.best, middle), least=least)
