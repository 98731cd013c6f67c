"""Numbers out of which features are made: all of the order of one, and each says whether it was measured.

A value that is not there is 0 beside a flag of its own, so that a linear layer gives its absence a learned weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from esper.leyline.evidence import GradientHealth, Reading, Status
from esper.leyline.observation import BlueprintInfo, Observation, SlotObservation
from esper.leyline.topology import Reach
from esper.tamiyo.policy.memory import Memory, Trace

Values = tuple[float, ...]

FLAGS = ("measured", "stale", "absent")
SHARE = ("value", *FLAGS)
GAIN = ("of_start", "of_start_known", "of_error", "of_error_known", "age", *FLAGS)
HEALTH = (
    *(f"{kind}_{column}" for kind in ("vanishing", "exploding") for column in SHARE),
    "nans",
    "infs",
)
SIZE = ("parameters", "flops", "flops_known")
REACH = (*(reach.name.lower() for reach in Reach), "unsaid")


@dataclass(slots=True)
class Sight:
    """What a feature is made of.

    Fields:
        run: the observation.
        memory: of earlier ticks and of this one.
        unit: where the loss began, None if unknown.
        tallies: by blueprint, in how many slots it lives, in how many it is a fossil, how often it failed.
        slot: the slot, for features of slots and entries.
        entry: the entry of its catalogue, for features of entries.
    """

    run: Observation
    memory: Memory
    unit: float | None
    tallies: dict[str, tuple[int, int, int]]
    slot: Any = None
    entry: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One meaning, in one or more columns.

    Fields:
        name: unique among its kind; a checkpoint names it.
        version: raised whenever what the columns mean changes; a checkpoint of another version is refused.
        columns: their names.
        reads: fields of the observation that it is made of.
        meaning: in words, for the docs.
        values: the columns' numbers.
    """

    name: str
    version: int
    columns: tuple[str, ...]
    reads: tuple[str, ...]
    meaning: str
    values: Callable[[Sight], Values]


class Table:
    """Features of one kind, in order."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.features: dict[str, Feature] = {}

    def add(
        self, name: str, columns: tuple[str, ...], *, reads: tuple[str, ...] | None = None, version: int = 1
    ) -> Callable[[Callable[[Sight], Values]], Callable[[Sight], Values]]:
        """Returns a decorator that adds a feature; its meaning is the docstring of the function.

        Args:
            name: of the feature.
            columns: of the feature.
            reads: fields of the observation; None is the one of the same name.
            version: see `Feature`.
        """

        def register(function: Callable[[Sight], Values]) -> Callable[[Sight], Values]:
            assert name not in self.features, name
            self.features[name] = Feature(
                name=name,
                version=version,
                columns=columns,
                reads=(name,) if reads is None else reads,
                meaning=" ".join((function.__doc__ or "").split()),
                values=function,
            )
            return function

        return register


def count(number: float) -> float:
    """Of a number of ticks or things: log(1 + n) / 3, which is 1 at 19."""
    return math.log1p(number) / 3.0


def size(part: float, whole: float) -> float:
    """Of a number of parameters or FLOPs beside the host's: log2(1 + 100 part / whole) / 4, which is 1 at 15 %."""
    return math.log2(1.0 + 100.0 * max(0.0, part) / max(1.0, whole)) / 4.0


def flags(reading: Reading) -> Values:
    """`FLAGS` of a reading."""
    status = reading.status
    return float(status is Status.MEASURED), float(status is Status.STALE), float(status is Status.ABSENT)


def share(reading: Reading) -> Values:
    """`SHARE` of a reading of the order of one."""
    return (0.0 if reading.value is None else reading.value, *flags(reading))


def optional(value: float | None) -> Values:
    """A number of the order of one that may be None: itself, and whether it is there."""
    return (0.0, 0.0) if value is None else (value, 1.0)


def gain(reading: Reading, sight: Sight) -> Values:
    """`GAIN` of a reading in nats: asinh(100 value / start), asinh(value / its standard error), its age in ticks."""
    value = reading.value
    if value is None or reading.tick is None:
        return 0.0, 0.0, 0.0, 0.0, 0.0, *flags(reading)
    of_start = (0.0, 0.0) if sight.unit is None else (math.asinh(100.0 * value / sight.unit), 1.0)
    of_error = (0.0, 0.0) if reading.se is None else (math.asinh(value / max(reading.se, 1e-12)), 1.0)
    return *of_start, *of_error, count(max(0, sight.run.tick - reading.tick)), *flags(reading)


LOSS = ("level", "level_known", "fall", "fall_known", "noise", "noise_known", *FLAGS)


def loss(reading: Reading, trace: Trace) -> Values:
    """`LOSS` of a reading: how far it has come from its first value, the last fall in units of its noise, its noise."""
    value, first, change, noise_sq = reading.value, trace.first, trace.change, trace.noise_sq
    unit = None if first is None else max(abs(first), 1e-12)
    level = (0.0, 0.0) if value is None or unit is None or first is None else ((first - value) / unit, 1.0)
    fall = noise = (0.0, 0.0)
    if noise_sq is not None and unit is not None and change is not None:
        scatter = max(math.sqrt(noise_sq), 1e-6 * unit)
        fall = (math.asinh(-change / scatter), 1.0)
        noise = (1.0 + math.log10(scatter / unit) / 3.0, 1.0)
    return *level, *fall, *noise, *flags(reading)


def health(told: GradientHealth) -> Values:
    """`HEALTH` of an owner's gradient."""
    return *share(told.vanishing), *share(told.exploding), count(told.nans), count(told.infs)


def kind_of(info: BlueprintInfo, run: Observation) -> Values:
    """`SIZE` beside the host, then `REACH`: what a blueprint is, its name left out."""
    host = run.host
    flops = (0.0, 0.0) if host.flops is None else (size(info.flops, host.flops), 1.0)
    reach = (*(float(info.reach is one) for one in Reach), float(info.reach is None))
    return size(info.parameters, host.parameters), *flops, *reach


def find_info(view: SlotObservation) -> BlueprintInfo | None:
    """The entry of the living seed in its slot's catalogue; None without a seed, or if it is not on offer."""
    return next((info for info in view.catalogue if info.name == view.blueprint), None)
