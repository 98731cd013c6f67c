"""Settings put hosts in training, a growth policy and PPO together, and what is learned is kept as a policy's file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.config.strict import as_plain
from esper.config.tree import RunConfig
from esper.leyline.errors import ConfigError
from esper.nissa.config import TelemetryConfig
from esper.run.learning.config import LearnConfig, PolicyRunConfig, build_policy_config
from esper.run.learning.kinds import ENVIRONMENTS, FlatAgentConfig, GrowthAgentConfig, ProbeConfig
from esper.run.learning.warm import WarmStartConfig
from esper.run.learning.work import build_agent, keep_policy
from esper.run.trials.environment import GrowthEnvConfig
from esper.simic.ppo.config import PPOConfig
from esper.simic.ppo.train import Plan, Training
from esper.tamiyo.policy.checkpoint import load_policy
from esper.tolaria.ranks.config import WorldConfig


def config_of(env: Any, agent: Any) -> PolicyRunConfig:
    """Settings of a short training, read back from plain data as a worker reads them."""
    config = PolicyRunConfig(
        seed=5,
        run=RunConfig(dir="run"),
        env=env,
        agent=agent,
        learn=LearnConfig(updates=1, envs=2),
        warm=WarmStartConfig(),
        ppo=PPOConfig(ticks=4, minibatches=1, epochs=1),
        world=WorldConfig(nproc_per_node=1),
        telemetry=TelemetryConfig(),
    )
    return build_policy_config(as_plain(config))


def test_a_growth_policy_learns_and_is_kept(tmp_path: Path) -> None:
    growth = GrowthEnvConfig(tasks=["d1"], seeds=1, most_ticks=3, twins=str(tmp_path / "twins"))
    config = config_of(growth, GrowthAgentConfig(width=8, hidden=4))
    env = ENVIRONMENTS["growth"].make(config.env, config.learn.envs, 0)
    agent = build_agent(config, env, torch.device("cpu"))
    first = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    Training(agent, env, config.ppo, Plan(updates=1, seed=config.seed)).run()
    keep_policy(config, agent, tmp_path, 1)
    kept, made, _ = load_policy(tmp_path / "policy.pt")
    learned = agent.state_dict()
    assert all(torch.equal(tensor, learned[name]) for name, tensor in kept.state_dict().items())
    assert any(not torch.equal(tensor, learned[name]) for name, tensor in first.items())
    assert made["env"]["tasks"] == ["d1"]
    assert str(tmp_path) not in str(made)


@pytest.mark.parametrize(
    ("env", "agent", "says"),
    [
        (ProbeConfig(), GrowthAgentConfig(), r"agent\.kind = 'growth': .* set env=growth"),
        (GrowthEnvConfig(tasks=["d1"]), FlatAgentConfig(), r"agent\.kind = 'flat': takes no observations of Growth"),
    ],
)
def test_an_agent_in_an_environment_that_it_cannot_read(env: Any, agent: Any, says: str) -> None:
    config = config_of(env, agent)
    with pytest.raises(ConfigError, match=says):
        build_agent(config, ENVIRONMENTS[config.env.kind].make(config.env, 2, 0), torch.device("cpu"))


def test_a_task_that_there_is_not_is_said_before_the_start() -> None:
    with pytest.raises(ConfigError, match="d99"):
        GrowthEnvConfig(tasks=["d99"])
