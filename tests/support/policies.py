"""Rollouts, learners and environments for tests of how a policy learns."""

from typing import Any, ClassVar

import numpy as np
import torch

from esper.simic.ppo.config import PPOConfig
from esper.simic.ppo.ppo import PPO
from esper.simic.ppo.ranks import Alone
from esper.simic.ppo.rollout import Collector, Rollout
from esper.simic.ppo.seeds import Purpose, make_generator, make_seed
from esper.simic.ppo.train import Plan, Training
from esper.simic.probes import FlatAgent, ProbeEnv, make_probe_agent
from esper.simic.probes.base import Arrays
from esper.simic.probes.memory import Gated


class Idle(Gated):
    """`Gated`, but the first row of some episodes is none: nothing is asked, and nothing that is answered counts.

    Args:
        num_envs: N. first: number of environment 0 among those of all ranks; later ones idle more often.
    """

    def __init__(self, num_envs: int, first: int = 0) -> None:
        self.first = first
        super().__init__(num_envs)

    def begin(self, rows: np.ndarray) -> None:
        super().begin(rows)
        often = np.array([self.rngs[row].random() < 0.2 + 0.1 * (self.first + row) for row in rows])
        self.at.setdefault("idle", np.zeros(self.num_envs, dtype=bool))[rows] = often

    def reset(self, **how: Any) -> tuple[Arrays, dict[str, Any]]:
        arrays, infos = super().reset(**how)
        return arrays, {**infos, "valid": ~self.at["idle"]}

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        idle, before = self.at["idle"], {name: array.copy() for name, array in self.at.items()}
        rewards, terminated, truncated = super().advance(actions)
        for name in ("step", "number"):
            self.at[name][idle] = before[name][idle]
        self.at["idle"] = np.zeros_like(idle)
        return np.where(idle, 0.0, rewards), terminated & ~idle, truncated & ~idle

    def step(self, actions: Any) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        arrays, rewards, terminated, truncated, infos = super().step(actions)
        return arrays, rewards, terminated, truncated, {**infos, "valid": ~self.at["idle"]}


class MaskWorth(ProbeEnv):
    """Two steps, then cut off. How much is legal says what is to come, so a value must be asked with its own mask: both
    options are legal at the end of an episode, one at its beginning."""

    heads: ClassVar[dict[str, int]] = {"op": 2}

    def begin(self, rows: np.ndarray) -> None:
        self.at.setdefault("step", np.zeros(self.num_envs, dtype=np.int64))[rows] = self.draw(rows, 2)

    def observe(self) -> Arrays:
        late = self.at["step"] == 2
        x = np.ones((self.num_envs, 2), dtype=np.float32)
        return {"x": x, "mask_op": np.stack([np.ones_like(late), late], axis=1)}

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        self.at["step"] = self.at["step"] + 1
        cut = self.at["step"] == 2
        return np.ones(self.num_envs), np.zeros_like(cut), cut


class MaskReader(FlatAgent):
    """An agent whose values depend on the mask, and on the state of its core."""

    def evaluate(self, x: torch.Tensor, context: None, observation: dict[str, torch.Tensor]) -> torch.Tensor:
        return super().evaluate(x, context, observation) + observation["mask_op"].float().sum(-1)


def collector_of(env: ProbeEnv, agent: FlatAgent, seed: int = 0, kind: type[Collector] = Collector) -> Collector:
    """A collector that has begun, with a stream for each environment."""
    rows = range(env.num_envs)
    collector = kind(env, agent, [make_generator(seed, Purpose.ACTIONS, row) for row in rows])
    collector.start([make_seed(seed, Purpose.ENVIRONMENT, row) for row in rows])
    return collector


def rollout_of(env: ProbeEnv, agent: FlatAgent, ticks: int = 24, seed: int = 0) -> Rollout:
    """A first rollout."""
    return collector_of(env, agent, seed).collect(ticks)


def config_of(**settings: Any) -> PPOConfig:
    """Settings for small rollouts."""
    return PPOConfig(**{"ticks": 24, "gamma": 0.9, "lr": 3e-3, **settings})


def ppo_of(agent: FlatAgent, envs: int, kind: type[PPO] = PPO, ranks: Any = None, **settings: Any) -> PPO:
    """A learner."""
    return kind(agent, config_of(**settings), ranks or Alone(), envs=envs, seed=0)


def training_of(
    env: ProbeEnv, *, updates: int, hidden: int = 0, seed: int = 0, width: int = 32, plan: Any = None, **settings: Any
) -> Training:
    """A training from seeded weights; ``settings`` are those of `PPOConfig`, and make_ppo, ranks and sink."""
    own = {name: settings.pop(name) for name in ("make_ppo", "ranks", "sink") if name in settings}
    torch.manual_seed(make_seed(seed, Purpose.WEIGHTS))
    agent = make_probe_agent(env, width=width, hidden=hidden)
    return Training(agent, env, config_of(**settings), Plan(updates=updates, seed=seed, **(plan or {})), **own)
