"""Whether a loss is out of line with those before it: robust statistics on the metric's own scale, pure functions.

    jump       loss > median + max(deviations * 1.4826 * MAD, rise * chance)      of the losses of healthy ticks
    blow-up    training loss > blowup * max(chance, least loss so far)
    collapse   training loss >= collapse * chance, though the median had once been < clearly_better * chance

The median absolute deviation is a standard deviation that up to half of the numbers cannot spoil (Hampel 1974; 1.4826
makes it one for normal noise). It measures what the loss does from tick to tick, trend and noise alike: a loss that
falls fast, or wavers, widens its own limit. ``chance`` is the entropy of the targets, the loss of a network that knows
their frequencies and nothing else: log(classes) where those are balanced. A rise below a share of it is never a panic,
however smooth the curve had been. A loss that climbs for long widens its limit as it goes; that is what the other two
are for, which stand on chance. They ask the training loss alone: a network that memorises may well come to do worse
than chance on what it has not seen. Scaling losses and ``chance`` together changes no verdict; a higher loss is never
judged better than a lower one.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from esper.accord.config import GovernorConfig


class Verdict(StrEnum):
    """Of one tick. SUSPECT: out of line, not yet long enough to act on."""

    HEALTHY = "HEALTHY"
    SUSPECT = "SUSPECT"
    PANIC = "PANIC"


class Symptom(StrEnum):
    """What is wrong; NONE of a healthy tick."""

    NONE = "NONE"
    NONFINITE = "NONFINITE"
    DIVERGENCE = "DIVERGENCE"
    COLLAPSE = "COLLAPSE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Losses of healthy ticks, newest last; the lowest median that they ever had, and the least of all; nats."""

    losses: tuple[float, ...] = ()
    best: float | None = None
    least: float | None = None


def chance_level(targets: Iterable[int]) -> float:
    """Entropy of the targets' frequencies, in nats; 0 where all are the same."""
    counts: dict[int, int] = {}
    for target in targets:
        counts[target] = counts.get(target, 0) + 1
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())


def deviation(losses: Sequence[float]) -> float:
    """1.4826 times the median absolute deviation from the median."""
    middle = statistics.median(losses)
    return 1.4826 * statistics.median(abs(loss - middle) for loss in losses)


def limit(series: Series, chance: float, config: GovernorConfig) -> float | None:
    """The loss above which the next one is out of line; None while there are too few to say."""
    if len(series.losses) < config.min_history:
        return None
    noise = config.deviations * deviation(series.losses)
    return statistics.median(series.losses) + max(noise, config.rise * chance)


def ceiling(series: Series, chance: float, config: GovernorConfig, *, training: bool) -> float | None:
    """The loss above which the next one is a divergence, by jump or by blow-up; None: it cannot be said yet."""
    jump = limit(series, chance, config)
    if not training or series.least is None:
        return jump
    blowup = config.blowup * max(chance, series.least)
    return blowup if jump is None else min(jump, blowup)


def collapsed(series: Series, loss: float, chance: float, config: GovernorConfig) -> bool:
    """A network that knew more than the frequencies of the targets knows no more than those."""
    known = series.best is not None and series.best < config.clearly_better * chance
    return known and loss >= config.collapse * chance


def symptom_of(series: Series, loss: float, chance: float, config: GovernorConfig, *, training: bool) -> Symptom:
    """What is wrong with one finite loss.

    Args:
        series: of the healthy ticks before. loss: nats a sample. chance: nats, see `chance_level`.
        training: it is the training loss, which can be told by chance, too.
    """
    most = ceiling(series, chance, config, training=training)
    if most is not None and loss > most:
        return Symptom.DIVERGENCE
    return Symptom.COLLAPSE if training and collapsed(series, loss, chance, config) else Symptom.NONE


def append_loss(series: Series, loss: float, config: GovernorConfig) -> Series:
    """The series with the loss of one more healthy tick."""
    losses = (*series.losses, loss)[-config.history :]
    least = loss if series.least is None else min(series.least, loss)
    if len(losses) < config.min_history:
        return Series(losses=losses, best=series.best, least=least)
    middle = statistics.median(losses)
    return Series(losses=losses, best=middle if series.best is None else min(series.best, middle), least=least)
