"""Puts the environment of a growth policy together: hosts, twins, and room for the largest observation of its tasks."""

from collections.abc import Callable, Sequence
from pathlib import Path

from esper.leyline.protocols import Trials
from esper.run.trials.parts import TrialMaker
from esper.run.trials.plain import PlainTrials
from esper.simic.env.reward import RewardConfig
from esper.simic.env.tasks import GrowthTask
from esper.simic.env.twins import Twins
from esper.simic.env.vector import GrowthVectorEnv
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.handshake import code_digest
from esper.tolaria.ranks.world import World

MakeTrials = Callable[[int, TrialMaker], Trials[GrowthTask]]


def plain_trials(size: int, maker: TrialMaker) -> PlainTrials:
    """Hosts of this process alone, one after the other, whatever ranks there are."""
    return PlainTrials(size, maker=maker, world=World(WorldConfig(), ControlConfig(), alone=True))


def make_environment(
    tasks: Sequence[GrowthTask],
    envs: int,
    *,
    seeds: int,
    first_seed: int = 0,
    config: RewardConfig | None = None,
    folder: Path | None = None,
    maker: TrialMaker | None = None,
    make_trials: MakeTrials = plain_trials,
    room: tuple[int, int] | None = None,
    most_ticks: int | None = None,
) -> GrowthVectorEnv:
    """Makes an environment on this process's CPU.

    Args:
        tasks: from which episodes are drawn.
        envs: hosts.
        seeds: trials' seeds that there are for each task.
        first_seed: the first of them.
        config: what growth is paid for.
        folder: of the twins' curves on disk; None keeps them in memory.
        maker: makes the parts of trials.
        make_trials: makes hosts, a number of them, and a few more for the twins.
        room: slots and blueprints per slot to pad to; None is as many as these tasks have.
        most_ticks: steps after which an episode is cut off; None never does.

    Raises:
        ConfigError: settings of a task are wrong.
        DataError: data of a task cannot be made.
    """
    maker = maker or TrialMaker()
    terms = [maker.shared(task, first_seed)[0].terms for task in tasks]
    slots, entries = room or (
        max(len(one.places) for one in terms),
        max(len(infos) for one in terms for infos in one.catalogue.values()),
    )
    twins = Twins(make_trials(min(envs, 8), maker), folder=folder, key=code_digest())
    return GrowthVectorEnv(
        make_trials(envs, maker),
        tasks,
        twins,
        seeds=seeds,
        first_seed=first_seed,
        slots=slots,
        entries=entries,
        config=config,
        most_ticks=most_ticks,
    )
