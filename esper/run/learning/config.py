"""Every setting of the training of a policy, in one tree that is checked whole before any process starts."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.config.strict import Reader
from esper.config.tree import RunConfig, read_plain
from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks
from esper.nissa.config import TelemetryConfig
from esper.run.learning.kinds import AGENTS, ENVIRONMENTS
from esper.run.learning.warm import WarmStartConfig
from esper.simic.ppo.config import PPOConfig
from esper.tolaria.ranks.config import WorldConfig


@dataclass(kw_only=True, slots=True)
class LearnConfig:
    """How long a policy is trained, in how many environments, and what is kept."""

    updates: int = 200
    """Rollouts to learn from, all in all."""

    envs: int = 16
    """Environments of each rank."""

    save_every: int = 20
    """Updates between checkpoints; there is one at the end, and one at a stop, in any case."""

    keep: int = 2
    """Newest checkpoints that are kept."""

    episodes: int = 4
    """Episodes of each environment that the finished policy plays, greedily and drawn; their mean return is the result
    of the run."""

    timeout_s: float = 1800.0
    """Seconds that ranks wait for each other. Some environments take longer than others, and an evaluation is rank 0's
    alone."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("updates", "envs", "save_every", "keep", "episodes"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("timeout_s", self.timeout_s > 0, "seconds, must be > 0")


@dataclass(kw_only=True, slots=True)
class PolicyRunConfig:
    """One training of a policy."""

    seed: int
    """Seed of everything random, 0 to 2147483647."""

    run: RunConfig
    """Where the run lies and what it is called."""

    env: Any
    """What it learns in."""

    agent: Any
    """Its network."""

    learn: LearnConfig
    """For how long."""

    warm: WarmStartConfig
    """What it begins with."""

    ppo: PPOConfig
    """How."""

    world: WorldConfig
    """Processes and devices."""

    telemetry: TelemetryConfig
    """What is told, and where."""


SECTIONS: dict[str, type] = {
    "run": RunConfig,
    "learn": LearnConfig,
    "warm": WarmStartConfig,
    "ppo": PPOConfig,
    "world": WorldConfig,
    "telemetry": TelemetryConfig,
}


def own_classes() -> list[type]:
    """The config classes that no other kind of run has."""
    environments, agents = ([kind.config for kind in kinds.values()] for kinds in (ENVIRONMENTS, AGENTS))
    return [*environments, *agents, LearnConfig, WarmStartConfig, PPOConfig]


def build_policy_config(plain: Any) -> PolicyRunConfig:
    """Builds the config from plain data.

    Raises:
        ConfigError: the settings are wrong; every problem of the whole tree has a line.
    """
    if not isinstance(plain, dict):
        raise ConfigError(f"config = {plain!r}: expected a mapping of sections")
    reader = Reader()
    kinds: dict[str, Mapping[str, Any]] = {"env": ENVIRONMENTS, "agent": AGENTS}
    names = ("seed", *kinds, *SECTIONS)
    reader.problems += [
        f"{key} = {plain[key]!r}: no such section; a policy's are {', '.join(names)}"
        for key in plain
        if key not in names
    ]
    reader.problems += [f"{key}: missing; it belongs to conf/policy.yaml" for key in names if key not in plain]
    parts: dict[str, Any] = {}
    for name, known in kinds.items():
        section = plain.get(name)
        kind = str(section.get("kind")) if isinstance(section, dict) else ""
        if kind in known:
            parts[name] = reader.section(known[kind].config, section, name)
        elif name in plain:
            reader.problem(f"{name}.kind", kind, f"unknown; known are {', '.join(known)}", f"for example {name}=probe")
    for name, cls in SECTIONS.items():
        if name in plain:
            parts[name] = reader.section(cls, plain[name], name)
    seed = plain.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31:
        reader.problem("seed", seed, "expected a whole number, 0 to 2147483647", "for example seed=1")
    if not reader.problems:
        ranks = parts["world"].nproc_per_node * parts["world"].nnodes
        total, into = parts["learn"].envs * ranks, parts["ppo"].minibatches
        if total % into:
            reader.problem("ppo.minibatches", into, f"must divide the {total} environments of all ranks", "set another")
    if reader.problems:
        raise ConfigError(dict.fromkeys(reader.problems))
    return PolicyRunConfig(seed=seed, **parts)


def load_policy_config(path: Path) -> tuple[PolicyRunConfig, dict[str, Any]]:
    """Reads RUN/config.yaml; returns the config and its plain data.

    Raises:
        ConfigError: see `read_plain` and `build_policy_config`.
    """
    plain = read_plain(path)
    return build_policy_config(plain), plain
