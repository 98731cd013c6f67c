"""Hosts of a growth policy stepped together, against the same hosts by the engine, one after the other, on one thread.

All arms live the same: small CNNs of one shape on digits, with births, prunes and ramps drawn at random, so that seeds
of all blueprints stand in some nets and most slots are empty. A round is one tick of every host in each arm: steps,
validation, looks, births, records and observations. What is measured is processor time. Rounds begin once lives differ.

`share` is what a policy costs beside the hosts that it decides for, in its training: features, masks, the network and
rewards, and then learning as well. `ranks` is an update of a training on all ranks, each with as many hosts as a rank
alone, against one on a rank alone; there ranks wait for each other, so it is wall time.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch.distributed as dist

from benching.harness import Ratio, interleave, ratio_of
from esper.leyline.commands import Command
from esper.leyline.protocols import Report, Trials
from esper.run.trials.environment import make_environment, plain_trials
from esper.run.trials.parts import TrialMaker
from esper.run.trials.plain import PlainTrials
from esper.run.trials.recipe import batched_trials
from esper.simic.batched import BatchedTrials
from esper.simic.env.tasks import Family, GrowthTask
from esper.simic.ppo.config import PPOConfig
from esper.simic.ppo.ranks import Alone, Ranks
from esper.simic.ppo.train import Plan, Training
from esper.tamiyo.policy.network import GrowthAgent
from esper.tamiyo.random import RandomConfig, RandomController
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World

TASK = GrowthTask(name="bench", family=Family.DIGITS, width=4, depth=2, samples=600, noise=0.1, steps=100_000, every=20)
DIFFER = 12  # ticks until lives differ
ROLLOUT = 8  # ticks of an update
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


class Clocked(Trials[GrowthTask]):
    """Hosts whose processor time is counted.

    Args:
        trials: the hosts.

    Fields:
        seconds: spent in them since it was last set to 0.
    """

    def __init__(self, trials: Trials[GrowthTask]) -> None:
        self._trials, self.seconds = trials, 0.0

    def __len__(self) -> int:
        """The number of hosts."""
        return len(self._trials)

    def begin(self, index: int, task: GrowthTask, seed: int) -> Report:
        """See `Trials`."""
        return self.begin_many([(index, task, seed)])[0]

    def begin_many(self, trials: Sequence[tuple[int, GrowthTask, int]]) -> list[Report]:
        """See `Trials`."""
        began = time.process_time()
        reports = self._trials.begin_many(trials)
        self.seconds += time.process_time() - began
        return reports

    def advance(self, commands: Sequence[Sequence[Command]]) -> tuple[Report, ...]:
        """See `Trials`."""
        began = time.process_time()
        reports = self._trials.advance(commands)
        self.seconds += time.process_time() - began
        return reports


def training_of(hosts: int, ranks: Ranks) -> tuple[Training, Clocked]:
    """A training of a new policy in tasks of thirty ticks, `ROLLOUT` ticks an update, begun."""
    made: list[Clocked] = []

    def make_trials(size: int, maker: TrialMaker) -> Trials[GrowthTask]:
        made.append(Clocked(batched_trials(size, maker)))
        return made[-1]

    env = make_environment([replace(TASK, steps=600)], hosts, seeds=2, make_trials=make_trials)
    config = PPOConfig(ticks=ROLLOUT, minibatches=4)
    training = Training(GrowthAgent(), env, config, Plan(updates=1_000_000, seed=1), ranks=ranks)
    training.begin()
    return training, made[0]


def bench_share(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """What is not spent in hosts, as a share, on rank 0 alone; A/A is one update's hosts against the one before."""
    if rank:
        return []
    training, hosts = training_of(64, Alone())
    deciding, learning = [], []
    spent_before = None
    same = []
    for number in range(rounds + 1):
        hosts.seconds, began = 0.0, time.process_time()
        rollout = training.collector.collect(ROLLOUT)
        between = time.process_time()
        training.ppo.update(rollout, number, 0.0)
        ended = time.process_time()
        if spent_before is not None:
            deciding.append((between - began - hosts.seconds, between - began))
            learning.append((ended - began - hosts.seconds, ended - began))
            same.append(hosts.seconds / spent_before)
        spent_before = hosts.seconds
    where = f"64 CNNs of one shape, a new policy, {ROLLOUT} ticks an update, processor time"
    lines = []
    for name, parts, budget, limit in (
        ("a policy's decisions / all that collecting takes", deciding, "at most 0.1 of the time", 0.1),
        ("decisions and learning / all that a training takes", learning, "none: reported", None),
    ):
        own, whole = ([part[k] for part in parts] for k in range(2))
        again = [factor * seconds for factor, seconds in zip(same, whole, strict=True)]
        times = {"esper": own, "plain": whole, "plain again": again}
        lines.append(ratio_of(name, where, budget, limit, times))
    return lines


def bench_ranks(rank: int, world_size: int, rounds: int) -> list[Ratio]:
    """Wall time of an update on all ranks, 32 hosts on each, against one of rank 0 with its 32."""
    world = World(WorldConfig(), ControlConfig(slow_timeout_s=600.0, timeout_s=600.0))

    def arm(training: Training | None) -> Callable[[], float]:
        def update() -> float:
            began = time.perf_counter()
            if training is not None:
                training.ppo.update(training.collector.collect(ROLLOUT), 0, 0.0)
            return time.perf_counter() - began

        return update

    alone = [training_of(32, Alone())[0] if rank == 0 else None for _ in range(2)]
    arms = {"esper": arm(training_of(32, world)[0]), "plain": arm(alone[0]), "plain again": arm(alone[1])}
    times = interleave(arms, rounds)
    if world_size > 1:
        dist.barrier()
    world.close()
    if rank:
        return []
    pace = {name: 32 * ROLLOUT / statistics.median(seconds) for name, seconds in times.items()}
    words = f"{world_size * pace['esper']:.0f} env-steps a second on {world_size} ranks, {pace['plain']:.0f} on one"
    where = f"32 CNNs of one shape on each rank, {ROLLOUT} ticks and four passes an update; {words}"
    return [ratio_of(f"an update on {world_size} ranks / on one alone", where, "none: reported", None, times)]


PARTS = {"many64": bench_64, "many16": bench_16, "share": bench_share, "ranks": bench_ranks}
