"""Tasks for a growth policy: what a host learns, how large it is, and how much it may spend.

A task names a family of data, the host's width and depth, the size and the label noise of the training part, and a
budget. It becomes a run's config in `esper.run.trials`; nothing here touches a tensor. Host shapes are few, so that
many hosts of one shape can be stepped together.

`draw_task` makes tasks without end, as a function of a seed. `TRAINING` and `HELD_OUT` are 20 each by name. Held-out
tasks have widths, noise and budgets outside the ranges of training (see `RANGES`). Whether growing pays in a task, and
when, is not declared here but measured: see docs/policy.md.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks


class Family(StrEnum):
    """DIGITS: handwritten digits, a CNN. BYTES: Python sources byte by byte, a GPT. RECALL: look-ups, a GPT."""

    DIGITS = "digits"
    BYTES = "bytes"
    RECALL = "recall"


class Purpose(StrEnum):
    """What tasks are for: learning a policy, or judging it."""

    TRAINING = "training"
    HELD_OUT = "held_out"


@dataclass(frozen=True, slots=True, kw_only=True)
class GrowthTask:
    """One task.

    Fields:
        name: unique among the tasks of a run.
        family: data and kind of host.
        width: channels of the CNN's first stage (each further stage has twice as many), or of the GPT's stream.
        depth: stages of the CNN, or blocks of the GPT.
        samples: of the training part.
        noise: share of the training labels that are wrong, 0 to 1; 0 for bytes.
        steps: the FLOP budget, in optimizer steps of the bare host.
        every: optimizer steps between ticks.
    """

    name: str
    family: Family
    width: int
    depth: int
    samples: int
    noise: float
    steps: int
    every: int = 20

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("width", "depth", "samples", "steps", "every"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("width", self.width % 2 == 0, "must be even")
            check("noise", 0 <= self.noise <= 1, "share of the training labels, must be 0 to 1")
            check("noise", self.noise == 0 or self.family is not Family.BYTES, "must be 0 for bytes")
            check("steps", self.steps >= 2 * self.every, "must be at least two ticks")

    @property
    def shape(self) -> tuple[str, int, int]:
        """What hosts that are stepped together have in common: family, width, depth."""
        return self.family.value, self.width, self.depth


@dataclass(frozen=True, slots=True, kw_only=True)
class Range:
    """From what tasks of a family are drawn.

    Fields:
        hosts: (width, depth), each as likely as the others.
        samples: sizes of the training part.
        noise: shares of wrong labels.
        steps: least and greatest budget, in steps of the bare host; drawn evenly in its logarithm.
    """

    hosts: tuple[tuple[int, int], ...]
    samples: tuple[int, ...]
    noise: tuple[float, ...]
    steps: tuple[int, int]


RANGES: dict[Purpose, dict[Family, Range]] = {
    Purpose.TRAINING: {
        Family.DIGITS: Range(hosts=((4, 2),), samples=(250, 500, 1000), noise=(0.0, 0.2), steps=(200, 1800)),
        Family.BYTES: Range(hosts=((16, 1),), samples=(1000, 4000), noise=(0.0,), steps=(200, 1800)),
        Family.RECALL: Range(hosts=((16, 1),), samples=(1000, 4000), noise=(0.0, 0.1), steps=(200, 1800)),
    },
    Purpose.HELD_OUT: {
        Family.DIGITS: Range(
            hosts=((2, 2), (8, 2)), samples=(250, 500, 1000), noise=(0.1, 0.3, 0.4), steps=(120, 2400)
        ),
        Family.BYTES: Range(hosts=((8, 1), (24, 1)), samples=(1000, 4000), noise=(0.0,), steps=(120, 2400)),
        Family.RECALL: Range(hosts=((12, 1), (24, 1)), samples=(1000, 4000), noise=(0.05, 0.2), steps=(120, 2400)),
    },
}


def draw_task(purpose: Purpose, seed: int, number: int) -> GrowthTask:
    """Draws task ``number`` of an endless series, a pure function of its arguments."""
    draws = np.random.default_rng(np.random.SeedSequence([seed, number, list(Purpose).index(purpose)]))
    family = list(Family)[int(draws.integers(len(Family)))]
    ranges = RANGES[purpose][family]
    width, depth = ranges.hosts[int(draws.integers(len(ranges.hosts)))]
    low, high = map(math.log, ranges.steps)
    return GrowthTask(
        name=f"{purpose.value}-{seed}-{number}",
        family=family,
        width=width,
        depth=depth,
        samples=ranges.samples[int(draws.integers(len(ranges.samples)))],
        noise=ranges.noise[int(draws.integers(len(ranges.noise)))],
        steps=round(math.exp(draws.uniform(low, high))),
    )


def _tasks(rows: str) -> tuple[GrowthTask, ...]:
    tasks = []
    for row in rows.strip().splitlines():
        name, family, width, depth, samples, noise, steps = row.split()
        tasks.append(
            GrowthTask(
                name=name,
                family=Family(family),
                width=int(width),
                depth=int(depth),
                samples=int(samples),
                noise=float(noise),
                steps=int(steps),
            )
        )
    return tuple(tasks)


#   name family width depth samples noise  steps; tasks that differ in steps alone share the runs that tell their kinds
TRAINING = _tasks("""
    d1   digits 4     2     1000    0.0    200
    d2   digits 4     2     1000    0.0    400
    d3   digits 4     2     1000    0.0    700
    d4   digits 4     2     1000    0.0    1100
    d5   digits 4     2     1000    0.0    1800
    d6   digits 4     2     250     0.2    200
    d7   digits 4     2     250     0.2    500
    d8   digits 4     2     250     0.2    900
    d9   digits 4     2     250     0.2    1500
    b1   bytes  16    1     4000    0.0    200
    b2   bytes  16    1     4000    0.0    500
    b3   bytes  16    1     4000    0.0    1000
    b4   bytes  16    1     4000    0.0    1800
    r1   recall 16    1     4000    0.0    250
    r2   recall 16    1     4000    0.0    600
    r3   recall 16    1     4000    0.0    1000
    r4   recall 16    1     4000    0.0    1600
    r5   recall 16    1     1000    0.1    300
    r6   recall 16    1     1000    0.1    700
    r7   recall 16    1     1000    0.1    1300
""")
HELD_OUT = _tasks("""
    hd1  digits 2     2     1000    0.1    120
    hd2  digits 2     2     1000    0.1    150
    hd3  digits 2     2     1000    0.1    300
    hd4  digits 2     2     1000    0.1    400
    hd5  digits 2     2     1000    0.1    500
    hd6  digits 2     2     1000    0.1    1000
    hd7  digits 2     2     250     0.3    150
    hd8  digits 2     2     250     0.3    200
    hd9  digits 8     2     1000    0.1    200
    hd12 digits 8     2     500     0.4    1200
    hd13 digits 2     2     250     0.4    150
    hd14 digits 2     2     250     0.4    300
    hb1  bytes  8     1     4000    0.0    150
    hb2  bytes  8     1     4000    0.0    900
    hb3  bytes  24    1     1000    0.0    150
    hb4  bytes  24    1     1000    0.0    600
    hr1  recall 12    1     4000    0.2    150
    hr2  recall 12    1     4000    0.2    900
    hr3  recall 24    1     4000    0.05   200
    hr4  recall 24    1     4000    0.05   500
""")
REGISTERED: dict[Purpose, tuple[GrowthTask, ...]] = {Purpose.TRAINING: TRAINING, Purpose.HELD_OUT: HELD_OUT}


def find_task(name: str) -> GrowthTask:
    """Returns a registered task.

    Raises:
        ConfigError: there is none of that name; the text lists all.
    """
    known = {task.name: task for tasks in REGISTERED.values() for task in tasks}
    if name not in known:
        raise ConfigError(f"task {name!r}: unknown; there are {', '.join(known)}")
    return known[name]
