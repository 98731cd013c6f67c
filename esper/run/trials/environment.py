"""Puts the environment of a growth policy together: hosts, twins, and room for the largest observation of its tasks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from esper.leyline.fields import Checks
from esper.leyline.protocols import Trials
from esper.run.trials.parts import TrialMaker
from esper.run.trials.plain import PlainTrials
from esper.run.trials.recipe import batched_trials
from esper.simic.env.reward import RewardConfig
from esper.simic.env.tasks import REGISTERED, GrowthTask, Purpose, find_task
from esper.simic.env.twins import Twins
from esper.simic.env.vector import GrowthVectorEnv
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.handshake import code_digest
from esper.tolaria.ranks.world import World


class TrialsKind(StrEnum):
    """BATCHED: hosts of one shape are stepped together. PLAIN: the engine, one host after the other."""

    BATCHED = "batched"
    PLAIN = "plain"


@dataclass(kw_only=True, slots=True)
class GrowthEnvConfig:
    """Hosts in training, in which a policy learns when, where and what to grow."""

    kind: str = "growth"
    """``growth``."""

    tasks: list[str] = field(default_factory=list)
    """Names of registered tasks, each as likely as the others; empty: all that are for training."""

    seeds: int = 8
    """Seeds of trials that there are for each task; every task and seed has a twin to train once."""

    first_seed: int = 0
    """The first of them. A policy is judged on others than it learned from."""

    trials: TrialsKind = TrialsKind.BATCHED
    """How hosts are trained: ``batched`` steps those of one shape together, ``plain`` runs the engine for one after the
    other. They come to the same numbers up to rounding.
    """

    twins: str | None = None
    """Folder in which the twins' curves are kept and found again; null: in memory."""

    size_price: float = 0.02
    """Nats of validation loss for each e-fold of the parameters relative to the bare host."""

    birth_price: float = 0.002
    """Nats for each seed that enters the network."""

    prune_price: float = 0.002
    """Nats for each seed that is pruned, whatever ended it."""

    most_loss: float = 3.0
    """Nats above the twin beyond which a loss counts as no worse."""

    sparse: bool = False
    """Pay everything at the end."""

    in_noise: bool = False
    """Pay in units of the twin's own noise from tick to tick instead of nats, so that no task drowns another."""

    most_ticks: int | None = None
    """Ticks after which an episode is cut off; null: never."""

    def __post_init__(self) -> None:
        for name in self.tasks:
            find_task(name)
        self.reward()
        with Checks(self) as check:
            check("kind", self.kind == "growth", "this config is of kind 'growth'")
            check("seeds", self.seeds >= 1, "must be >= 1")
            check("first_seed", 0 <= self.first_seed < 2**31 - self.seeds, "must be >= 0, and all seeds below 2^31")
            check("twins", self.twins != "", "must name a folder, or null")
            check("most_ticks", self.most_ticks is None or self.most_ticks >= 1, "must be >= 1, or null")

    def reward(self) -> RewardConfig:
        """What growth is paid for."""
        return RewardConfig(
            size_price=self.size_price,
            birth_price=self.birth_price,
            prune_price=self.prune_price,
            most_loss=self.most_loss,
            sparse=self.sparse,
            in_noise=self.in_noise,
        )


MakeTrials = Callable[[int, TrialMaker], Trials[GrowthTask]]


def plain_trials(size: int, maker: TrialMaker) -> PlainTrials:
    """Hosts of this process alone, one after the other, whatever ranks there are."""
    return PlainTrials(size, maker=maker, world=World(WorldConfig(), ControlConfig(), alone=True))


TRIALS: dict[TrialsKind, MakeTrials] = {TrialsKind.BATCHED: batched_trials, TrialsKind.PLAIN: plain_trials}


def make_growth_environment(
    config: GrowthEnvConfig, envs: int, first: int = 0, *, make_trials: MakeTrials | None = None
) -> GrowthVectorEnv:
    """Makes N environments by settings.

    Args:
        config: the settings.
        envs: N.
        first: number of the first one among those of all ranks; `reset` gets their seeds, so nothing depends on it.
        make_trials: makes hosts; None makes those of ``config.trials``.

    Raises:
        ConfigError: settings of a task are wrong.
        DataError: data of a task cannot be made.
    """
    tasks = tuple(map(find_task, config.tasks)) or REGISTERED[Purpose.TRAINING]
    return make_environment(
        tasks,
        envs,
        seeds=config.seeds,
        first_seed=config.first_seed,
        config=config.reward(),
        folder=None if config.twins is None else Path(config.twins),
        make_trials=make_trials or TRIALS[config.trials],
        most_ticks=config.most_ticks,
    )


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
        make_trials: makes hosts, a number of them; for the twins, too.
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
    twins = Twins(lambda size: make_trials(size, maker), tasks=tasks, folder=folder, key=code_digest())
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
