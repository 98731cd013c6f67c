"""Made-up series of losses, a row for each run and a column for each tick, with the standard error of every loss.

The means and their errors come from drawn samples, so a tick's error says as much as it does in a run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy
from numpy.random import Generator
from numpy.typing import NDArray

from esper.accord.verdict import chance_level

Losses = NDArray[numpy.float64]
TICKS, TEN = 400, float(numpy.log(10))


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Runs of one kind.

    Fields:
        train: training losses, [runs, ticks].
        train_errors: their standard errors.
        validation: validation losses, or None.
        validation_errors: their standard errors.
        chance: chance level; 0 where there is none.
        change: tick at which the trouble begins, for those that fall ill.
        soon: ticks within which it is to be seen.
        fading: ticks at which a blended seed loses some of its alpha, so that the series begin anew.
    """

    train: Losses
    train_errors: Losses
    validation: Losses | None = None
    validation_errors: Losses | None = None
    chance: float = TEN
    change: int = 0
    soon: int = 5
    fading: range = range(0)


def _ticks(runs: int) -> Losses:
    return numpy.broadcast_to(numpy.arange(TICKS, dtype=float), (runs, TICKS))


def _sampled(rng: Generator, mean: Losses, spread: float, samples: int, jitter: float = 0.0) -> tuple[Losses, Losses]:
    """Means of ``samples`` normal losses, with jitter between ticks that no sampling error knows of."""
    error = numpy.full(mean.shape, spread / numpy.sqrt(samples))
    return mean + rng.normal(0, 1, mean.shape) * numpy.hypot(error, jitter), error


def rare_class(rng: Generator, runs: int, share: float, samples: int, hit: float = 4.0) -> Runs:
    """A tick's loss is a handful of samples that cost ``hit`` nats each, give or take half."""
    hits = rng.poisson(share * samples, (runs, TICKS))
    total = numpy.maximum(0.5 * hit * hits, hit * (hits + 0.5 * numpy.sqrt(hits) * rng.normal(0, 1, hits.shape)))
    mean = total / samples + 0.02 * share * rng.uniform(0.9, 1.1, hits.shape)
    variance = numpy.maximum(0, 1.25 * hits * hit**2 / samples - (total / samples) ** 2)
    positives = max(1, round(4096 * share))
    chance = chance_level([1] * positives + [0] * (4096 - positives))
    return Runs(train=mean, train_errors=numpy.sqrt(variance / (samples - 1)), chance=chance)


def heavy_tails(rng: Generator, runs: int, tail: float, samples: int = 64) -> Runs:
    """Each sample's loss is Pareto's; means as wide as 0.3 + 0.05 * one such number."""
    drawn = rng.pareto(tail, (samples, runs, TICKS)) + 1
    scale = 0.05 * samples ** (1 - 1 / min(tail, 2.0))
    return Runs(train=0.3 + scale * drawn.mean(0), train_errors=scale * drawn.std(0, ddof=1) / numpy.sqrt(samples))


def harder_once(rng: Generator, runs: int, step: float, within: int = 1) -> Runs:
    """The task becomes harder by ``step`` nats, for good, in training and validation."""
    lift = step * numpy.clip((_ticks(runs) - 200 + 1) / within, 0, 1)
    train, train_errors = _sampled(rng, 0.5 + lift, 0.6, 3200, 0.02)
    validation, validation_errors = _sampled(rng, 0.6 + lift, 0.8, 2000, 0.02)
    return Runs(train=train, train_errors=train_errors, validation=validation, validation_errors=validation_errors)


def slow_climb(rng: Generator, runs: int, over: int, rise: float = 1.2) -> Runs:
    """The loss climbs by ``rise`` nats over some ticks, as under an augmentation that grows."""
    lift = rise * numpy.clip((_ticks(runs) - 100) / over, 0, 1)
    train, errors = _sampled(rng, 0.4 + lift, 0.6, 3200, 0.02)
    return Runs(train=train, train_errors=errors)


def warmup_spike(rng: Generator, runs: int, height: float, rising: int) -> Runs:
    """The rate reaches its top: the loss rises by ``height`` nats in a few ticks and comes down in some more."""
    t = _ticks(runs)
    at = rng.integers(12, 40, (runs, 1))
    spike = numpy.where(t < at, 0, numpy.clip((t - at + 1) / rising, 0, 1) * numpy.exp(-numpy.maximum(0, t - at) / 4))
    train, errors = _sampled(rng, TEN * (0.15 + 0.85 * numpy.exp(-t / 25)) + height * spike, 0.8, 1600, 0.03)
    return Runs(train=train, train_errors=errors)


def label_noise(rng: Generator, runs: int, share: float) -> Runs:
    """Labels of a share of samples are drawn anew: training rests at their entropy, often near chance."""
    floor = share * TEN + (1 - share) * 0.1
    train, errors = _sampled(rng, floor + (TEN - floor) * numpy.exp(-_ticks(runs) / 20), 1.5, 640, 0.02)
    return Runs(train=train, train_errors=errors)


def near_zero(rng: Generator, runs: int, spikes: float) -> Runs:
    """All is learnt; now and then a sample is not."""
    hits = rng.random((runs, TICKS)) < spikes
    mean = 1e-5 * rng.lognormal(0, 1, (runs, TICKS)) + hits * rng.exponential(0.05, (runs, TICKS))
    return Runs(train=TEN * numpy.exp(-_ticks(runs) / 6) + mean, train_errors=mean / 2)


def negative(rng: Generator, runs: int, floor: float) -> Runs:
    """The log-likelihood of a density: it begins above zero and goes far below."""
    t = _ticks(runs)
    train, errors = _sampled(rng, floor + (1.5 - floor) * numpy.exp(-t / 40), 1.0, 1600, 0.05)
    validation, validation_errors = _sampled(rng, floor + 0.2 + (1.5 - floor) * numpy.exp(-t / 40), 1.2, 1000, 0.05)
    return Runs(
        train=train,
        train_errors=errors,
        validation=validation,
        validation_errors=validation_errors,
        chance=0.0,
    )


def memorising(rng: Generator, runs: int, width: float) -> Runs:
    """Validation climbs by 2.5 nats, in a logistic of some width, while training comes to rest near zero."""
    t = _ticks(runs)
    train, errors = _sampled(rng, TEN * numpy.exp(-t / 20) + 0.02, 0.1, 3200, 0.003)
    climb = numpy.maximum(0.5, TEN * numpy.exp(-t / 15)) + 2.5 / (1 + numpy.exp(-(t - 150) / width))
    validation, validation_errors = _sampled(rng, climb, 1.0, 10_000, 0.01)
    return Runs(train=train, train_errors=errors, validation=validation, validation_errors=validation_errors)


def wavering(rng: Generator, runs: int, share: float, factor: float = 2.5) -> Runs:
    """Validation is ``factor`` times as high at a share of ticks, as with batch statistics at a high rate."""
    t = _ticks(runs)
    train, errors = _sampled(rng, TEN * numpy.exp(-t / 60) + 0.3, 0.6, 3200, 0.03)
    calm = (TEN * numpy.exp(-t / 60) + 0.5) * numpy.exp(0.05 * rng.normal(0, 1, t.shape))
    validation = calm * numpy.where(rng.random(t.shape) < share, factor, 1)
    return Runs(
        train=train,
        train_errors=errors,
        validation=validation,
        validation_errors=numpy.full(t.shape, 0.01),
    )


def without_its_seed(rng: Generator, runs: int, chances: float, fall: float, ticks: int) -> Runs:
    """A seed fades in some ticks. Without it the host stands at a multiple of chance, and learns to do without."""
    t = _ticks(runs)
    level = rng.uniform(0.2, 1.0, (runs, 1))
    rise = numpy.clip((t - 200 + 1) / ticks, 0, 1) * numpy.exp(-numpy.maximum(0, t - 200 - ticks) / fall)
    train, errors = _sampled(rng, (level + TEN * chances * rise) * rng.lognormal(0, 0.02, t.shape), 0.3, 640)
    return Runs(train=train, train_errors=errors, fading=range(200, 200 + ticks))


# Each kind in the sizes that it comes in; a thousand runs of a kind are shared out among them.
HEALTHY: dict[str, list[Callable[[Generator, int], Runs]]] = {
    "rare class": [
        lambda g, n, share=share, samples=samples, hit=hit: rare_class(g, n, share, samples, hit)
        for share, samples, hit in (
            (1e-2, 3200, 4.0),
            (1e-3, 3200, 4.0),
            (3e-4, 3200, 4.0),
            (1e-4, 3200, 4.0),
            (3e-5, 3200, 4.0),
            (3e-3, 640, 4.0),
            (3e-3, 640, 8.0),
        )
    ],
    "heavy tails": [lambda g, n, tail=tail: heavy_tails(g, n, tail) for tail in (1.2, 1.5, 2.0, 3.0)],
    "harder once": [
        lambda g, n, step=step, within=within: harder_once(g, n, step, within)
        for step, within in ((0.2, 1), (0.25, 1), (0.5, 1), (0.5, 2), (1.0, 1))
    ],
    "slow climb": [lambda g, n, over=over: slow_climb(g, n, over) for over in (10, 30, 100, 300)],
    "warm-up spike": [
        lambda g, n, height=height, rising=rising: warmup_spike(g, n, height, rising)
        for height, rising in ((0.5, 1), (1.0, 1), (1.0, 2), (1.5, 1), (1.5, 2))
    ],
    "label noise": [lambda g, n, share=share: label_noise(g, n, share) for share in (0.2, 0.4, 0.6, 0.75)],
    "loss near zero": [lambda g, n, spikes=spikes: near_zero(g, n, spikes) for spikes in (0.0, 0.05, 0.3)],
    "negative losses": [lambda g, n, floor=floor: negative(g, n, floor) for floor in (-0.5, -3.0, -20.0)],
    "memorising": [lambda g, n, width=width: memorising(g, n, width) for width in (2, 4, 8, 20)],
    "wavering validation": [
        lambda g, n, share=share, factor=factor: wavering(g, n, share, factor)
        for share, factor in ((0.05, 2.5), (0.1, 2.5), (0.3, 2.5), (0.05, 4.0))
    ],
    "without its seed": [
        lambda g, n, chances=chances, fall=fall, ticks=ticks: without_its_seed(g, n, chances, fall, ticks)
        for chances, fall, ticks in ((1.0, 10.0, 1), (2.5, 50.0, 10), (4.0, 2.0, 1), (4.0, 6.0, 3), (10.0, 6.0, 3))
    ],
}


def runaway(rng: Generator, runs: int, growth: float, samples: int = 640) -> Runs:
    """A rate 30 times too high: the loss grows by a factor a tick, up to several times chance, each sample as wild."""
    t = _ticks(runs)
    level = rng.uniform(0.1, 1.0, (runs, 1))
    most = TEN * rng.uniform(1.5, 20, (runs, 1))
    mean = numpy.minimum(most, level * growth ** numpy.maximum(0, t - 200 + 1)) * rng.lognormal(0, 0.2, t.shape)
    mean = numpy.where(t < 200, level + 0.02 * rng.normal(0, 1, t.shape), mean)
    errors = numpy.where(t < 200, 0.02, mean / numpy.sqrt(samples))
    return Runs(train=mean, train_errors=errors, change=200)


def collapsing(rng: Generator, runs: int, within: int, samples: int = 640) -> Runs:
    """The network comes to know the frequencies of its classes and nothing else."""
    t = _ticks(runs)
    level = rng.uniform(0.05, 1.5, (runs, 1))
    mean = level + (TEN - level) * numpy.clip((t - 200 + 1) / within, 0, 1)
    train, errors = _sampled(rng, mean + 0.01, 0.3, samples, 0.01)
    return Runs(train=train, train_errors=errors, change=200)


def negative_runaway(rng: Generator, runs: int) -> Runs:
    """A density that falls apart: far above where it began."""
    healthy = negative(rng, runs, -3.0)
    t = _ticks(runs)
    mean = numpy.where(t < 200, healthy.train, 5.0 * 3.0 ** numpy.minimum(8, t - 200) * rng.lognormal(0, 0.3, t.shape))
    return Runs(train=mean, train_errors=numpy.where(t < 200, healthy.train_errors, mean / 25), chance=0.0, change=200)


def runaway_while_fading(rng: Generator, runs: int, within: int, ticks: int) -> Runs:
    """While a seed fades the loss blows up to several times chance, and stays there."""
    t = _ticks(runs)
    level, most = rng.uniform(0.2, 1.0, (runs, 1)), TEN * rng.uniform(4, 20, (runs, 1))
    mean = level + (most - level) * numpy.clip((t - 200 + 1) / within, 0, 1)
    train, errors = _sampled(rng, mean * rng.lognormal(0, 0.02, t.shape), 0.3, 640)
    return Runs(train=train, train_errors=errors, change=200, soon=8, fading=range(198, 198 + ticks))


SICK: dict[str, list[Callable[[Generator, int], Runs]]] = {
    "rate x 30": [lambda g, n, growth=growth: runaway(g, n, growth) for growth in (3.0, 5.0, 30.0)],
    "collapse": [lambda g, n, within=within: collapsing(g, n, within) for within in (1, 2, 3)],
    "negative losses": [negative_runaway],
    "while a seed fades": [
        lambda g, n, within=within, ticks=ticks: runaway_while_fading(g, n, within, ticks)
        for within, ticks in ((1, 3), (1, 10), (2, 10))
    ],
}
