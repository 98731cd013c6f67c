"""The environments that a policy can be trained in, and the agents that can learn in them, by kind.

Add one: a config class with ``kind``, a function that builds it, and a row below.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gymnasium.vector import VectorEnv

from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks
from esper.run.trials.environment import GrowthEnvConfig, make_growth_environment
from esper.simic.env.vector import GrowthVectorEnv
from esper.simic.probes import PROBES, ProbeEnv, make_probe, make_probe_agent
from esper.tamiyo.policy.agent import Agent
from esper.tamiyo.policy.network import GrowthAgent


@dataclass(kw_only=True, slots=True)
class ProbeConfig:
    """A small environment with a known answer."""

    kind: str = "probe"
    """``probe``."""

    name: str = "cartpole"
    """Which; `esper/simic/probes/` has them."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("name", self.name in PROBES, f"no such environment; there are {', '.join(PROBES)}")


@dataclass(kw_only=True, slots=True)
class FlatAgentConfig:
    """An agent for observations that are a vector."""

    kind: str = "flat"
    """``flat``."""

    width: int = 64
    """Units of the encoder."""

    hidden: int = 0
    """Units of the recurrent core; 0: no memory."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("width", self.width >= 1, "must be >= 1")
            check("hidden", self.hidden >= 0, "must be >= 0")


@dataclass(kw_only=True, slots=True)
class GrowthAgentConfig:
    """The network of a growth policy, for ``env=growth``."""

    kind: str = "growth"
    """``growth``."""

    width: int = 64
    """Units of its encoders and heads; even."""

    hidden: int = 64
    """Units of the recurrent core; 0: no memory."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("width", self.width >= 2 and self.width % 2 == 0, "must be even, and >= 2")
            check("hidden", self.hidden >= 0, "must be >= 0")


@dataclass(frozen=True, slots=True)
class EnvironmentKind:
    """How environments of a kind are made.

    Fields:
        config: their settings.
        make: builds N of them: (settings, N, number of the first among those of all ranks) -> environments.
    """

    config: type
    make: Callable[[Any, int, int], VectorEnv]


@dataclass(frozen=True, slots=True)
class AgentKind:
    """How an agent of a kind is made.

    Fields:
        config: its settings.
        make: builds it, with weights from torch's global stream: (settings, environments) -> agent.
    """

    config: type
    make: Callable[[Any, VectorEnv], Agent]


def _make_flat(config: FlatAgentConfig, env: VectorEnv) -> Agent:
    if not isinstance(env, ProbeEnv):
        raise ConfigError(f"agent.kind = 'flat': takes no observations of {type(env).__name__}; choose another agent")
    return make_probe_agent(env, width=config.width, hidden=config.hidden)


def _make_growth(config: GrowthAgentConfig, env: VectorEnv) -> Agent:
    if not isinstance(env, GrowthVectorEnv):
        raise ConfigError("agent.kind = 'growth': decides what hosts grow; set env=growth, or choose another agent")
    return GrowthAgent(width=config.width, hidden=config.hidden)


ENVIRONMENTS = {
    "probe": EnvironmentKind(ProbeConfig, lambda config, envs, first: make_probe(config.name, envs)),
    "growth": EnvironmentKind(GrowthEnvConfig, make_growth_environment),
}
AGENTS = {
    "flat": AgentKind(FlatAgentConfig, _make_flat),
    "growth": AgentKind(GrowthAgentConfig, _make_growth),
}
