"""A warm start: a new policy clones rules, or plans that paid, in the environment that it is going to learn in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks
from esper.leyline.observation import Observation
from esper.leyline.protocols import Controller
from esper.run.trials.planned import Planned
from esper.simic.env.episode import why_illegal_choice
from esper.simic.env.tasks import GrowthTask, find_task
from esper.simic.env.vector import GrowthVectorEnv
from esper.simic.ppo.imitate import ImitationConfig, imitate, record
from esper.simic.ppo.seeds import Purpose, make_seed
from esper.simic.ppo.train import Training
from esper.tamiyo.heuristic import HeuristicController
from esper.tamiyo.heuristic_config import HeuristicConfig
from esper.tamiyo.policy.options import HEADS, to_choice


@dataclass(kw_only=True, slots=True)
class WarmStartConfig:
    """Whether a new policy first clones a teacher."""

    ticks: int = 0
    """Steps of each environment in which the teacher acts and is recorded; 0: no warm start. An episode's returns are
    learned only if the record has it to its end.
    """

    teacher: HeuristicConfig = field(default_factory=HeuristicConfig)
    """The rules that are cloned."""

    plans: dict[str, dict[str, str]] | None = None
    """What is grown at the first tick, blueprint by slot, by name of task; tasks that are left out never grow. Then it
    is these plans that are cloned and not the rules: what paid best of all that ``launch/task_kinds.py`` has tried in
    the tasks of the training, say. null: the rules.
    """

    imitation: ImitationConfig = field(default_factory=ImitationConfig)
    """How."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("ticks", self.ticks >= 0, "must be >= 0")
        for name in self.plans or {}:
            find_task(name)


class Teacher:
    """Decides in every environment by rules or plans; of several commands of a tick the first that is legal counts.

    Args:
        env: whose observations are read.
        config: of the teacher.
    """

    def __init__(self, env: GrowthVectorEnv, config: WarmStartConfig) -> None:
        self._env, self._config = env, config
        self._controllers: list[Controller | None] = [None] * env.num_envs
        self._ticks = [0] * env.num_envs

    def __call__(self, arrays: Mapping[str, Any], infos: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """An option per head, int64 [N]; see `esper.simic.ppo.imitate.Decide`."""
        chosen = {head: np.zeros(self._env.num_envs, np.int64) for head in HEADS}
        for place, (task, seen) in enumerate(zip(self._env.playing(), self._env.observations(), strict=True)):
            controller = self._controllers[place]
            if controller is None or seen.tick <= self._ticks[place]:  # a new episode
                controller = self._controllers[place] = self._begin(task, seen)
            self._ticks[place] = seen.tick
            row = {name: array[place] for name, array in arrays.items()}
            for head, option in self._choose(seen, row, controller.decide(seen)).items():
                chosen[head][place] = option
        return chosen

    def _begin(self, task: GrowthTask, seen: Observation) -> Controller:
        if self._config.plans is not None:
            return Planned(self._config.plans.get(task.name, {}), 0.0)
        return HeuristicController(self._config.teacher, slots=tuple(view.slot for view in seen.slots), seed=0)

    def _choose(self, seen: Observation, row: Mapping[str, Any], said: list[Command]) -> dict[str, int]:
        for command in said:
            choice = to_choice(seen, command, self._env.choices)
            if why_illegal_choice(row, choice, self._env.choices) is None:
                return choice
        return dict.fromkeys(HEADS, 0)  # WAIT


def warm_up(
    training: Training, config: WarmStartConfig, env: VectorEnv, *, seed: int, device: torch.device
) -> list[dict[str, float]]:
    """Lets the policy of a training that has not begun clone the teacher; called on every rank.

    Args:
        training: whose agent learns, and whose scale of returns takes the record in.
        config: how.
        env: this rank's environments; they are reset.
        seed: of the training.
        device: of the record.

    Returns:
        The numbers of each pass.

    Raises:
        ConfigError: the environment has no hosts that grow.
    """
    if not isinstance(env, GrowthVectorEnv):
        raise ConfigError("warm.ticks: a teacher decides what hosts grow; set env=growth, or warm.ticks=0")
    seeds = [make_seed(seed, Purpose.IMITATION, number) for number in training.numbers]
    teacher = Teacher(env, config)
    taught = record(env, teacher, ticks=config.ticks, seeds=seeds, device=device)
    scale, gamma = training.ppo.scale, training.config.gamma
    found = imitate(training.agent, taught, config.imitation, scale, training.ranks, gamma=gamma, seed=seed)
    scale.restart()
    return found
