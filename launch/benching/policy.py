"""Hosts of a growth policy stepped together, against the same hosts by the engine, one after the other, on one thread.

All arms live the same: small CNNs of one shape on digits, with births, prunes and ramps drawn at random, so that seeds
of all blueprints stand in some nets and most slots are empty. A round is one tick of every host in each arm: steps,
validation, looks, births, records and observations. What is measured is processor time. Rounds begin once lives differ.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from benching.harness import Ratio, interleave, ratio_of
from esper.leyline.commands import Command
from esper.leyline.protocols import Report
from esper.run.trials.environment import plain_trials
from esper.run.trials.parts import TrialMaker
from esper.run.trials.plain import PlainTrials
from esper.run.trials.recipe import batched_trials
from esper.simic.batched import BatchedTrials
from esper.simic.env.tasks import Family, GrowthTask
from esper.tamiyo.random import RandomConfig, RandomController

TASK = GrowthTask(name="bench", family=Family.DIGITS, width=4, depth=2, samples=600, noise=0.1, steps=100_000, every=20)
DIFFER = 12  # ticks until lives differ
Hosts = PlainTrials | BatchedTrials[GrowthTask]


def ticking(trials: Hosts) -> Callable[[], float]:
    """Begins a trial in each place; returns a function that takes all by one tick, and says how long it took."""
    reports: Sequence[Report] = [trials.begin(place, TASK, place) for place in range(len(trials))]
    slots = tuple(view.slot for view in reports[0].observation.slots)
    controllers = [RandomController(RandomConfig(rate=0.3), slots=slots, seed=place) for place in range(len(trials))]

    def tick() -> float:
        nonlocal reports
        commands: list[list[Command]] = [
            controller.decide(report.observation) for controller, report in zip(controllers, reports, strict=True)
        ]
        began = time.process_time()
        reports = trials.advance(commands)
        return time.process_time() - began

    for _ in range(DIFFER):
        tick()
    return tick


def bench_many(count: int, limit: float | None, rounds: int) -> list[Ratio]:
    """Seconds of a tick of ``count`` hosts together, against one after the other."""
    maker = TrialMaker()
    arms = {
        "esper": ticking(batched_trials(count, maker)),
        "plain": ticking(plain_trials(count, maker)),
        "plain again": ticking(plain_trials(count, maker)),
    }
    times = interleave(arms, rounds)
    budget = "at least three times as many env-steps a second" if limit is not None else "none: reported"
    ratio = ratio_of(f"many hosts: {count} CNNs of one shape", "", budget, limit, times)
    pace = {name: count * len(seconds) / sum(seconds) for name, seconds in times.items()}
    words = f"{pace['esper']:.0f} env-steps a second of processor time together, {pace['plain']:.0f} one by one"
    return [replace(ratio, host=f"digits, widths 4 and 8, batch 32, {TASK.every} steps a tick; {words}")]


def bench_64(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """64 hosts, on rank 0 alone."""
    return bench_many(64, 1 / 3, rounds) if rank == 0 else []


def bench_16(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """16 hosts, on rank 0 alone."""
    return bench_many(16, None, rounds) if rank == 0 else []


PARTS = {"many64": bench_64, "many16": bench_16}
