"""Comparisons of growth policies over tasks: arms x tasks x seeds, with hosts of one shape stepped together.

conf/compare/NAME.yaml is of this kind if it has ``tasks``. An arm's score in a task with a seed is the objective of
`esper.simic.env.reward` at the end of the task's budget, against the host without growth of the same seed:

    score  = loss without growth - loss - size price * log(parameters / the bare host's) - prices of births and prunes
    regret = (oracle - score) / scale

The oracle of a task is the best mean score of all fixed sizes and plans, the scale the larger of the distances to it of
`random` and of the worst fixed size. Both are measured on ``oracle_seeds``, of which no arm is scored.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.config.strict import Reader, defaults_of
from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks
from esper.run.trials.cells import Arm
from esper.run.trials.planned import Planned
from esper.simic.env.reward import RewardConfig
from esper.simic.env.tasks import Family, GrowthTask, find_task
from esper.tamiyo.policy.checkpoint import load_policy
from esper.tamiyo.policy.controller import Mode, PolicyConfig, find_policy
from esper.tamiyo.registry import controller_config_class

BARE, RANDOM = "none", "random"


@dataclass(kw_only=True, slots=True)
class GrowthArm:
    """What decides in an arm."""

    controller: dict[str, Any] | None = None
    """Settings of a controller, with its ``kind``; null: nothing is said."""

    seeds: dict[str, dict[str, str]] = field(default_factory=dict)
    """Blueprint by slot, by family of tasks; a family that is left out never grows."""

    after: float | None = None
    """Share of the budget, 0 to 1, after which ``seeds`` are born; null: they are there from the first step."""

    scored: bool = True
    """Whether it has a row of its own; false: it serves the oracle alone."""

    @property
    def is_size(self) -> bool:
        """Whether it is a network of a fixed size."""
        return self.controller is None and self.after is None

    @property
    def is_plan(self) -> bool:
        """Whether it grows by plan."""
        return self.controller is None and self.after is not None

    def __post_init__(self) -> None:
        with Checks(self) as check:
            known = {family.value for family in Family}
            check("seeds", set(self.seeds) <= known, f"families of tasks are {', '.join(sorted(known))}")
            check("seeds", not (self.controller and self.seeds), "a controller decides itself what grows")
            check("after", self.after is None or 0 <= self.after < 1, "share of the budget, 0 to below 1, or null")


@dataclass(kw_only=True, slots=True)
class GrowthCompareConfig:
    """A comparison over tasks."""

    tasks: list[str]
    """Names of registered tasks."""

    seeds: list[int]
    """Seeds on which arms are scored, one or more, each once."""

    oracle_seeds: list[int]
    """Seeds on which the oracle and the scale of regret are measured; none of ``seeds``."""

    subject: str
    """The arm that the claims are about."""

    reference: str
    """The arm that it is not to be worse than by more than the margin."""

    margin: float
    """How much more regret than the reference's is too much. Written before the tasks are first read."""

    places: int = 64
    """Hosts in training at a time."""

    reward: RewardConfig = field(default_factory=RewardConfig)
    """What a score consists of."""

    arms: dict[str, GrowthArm]
    """What each arm has of its own, by name. ``none`` and ``random`` must be there."""

    def __post_init__(self) -> None:
        for name in self.tasks:
            find_task(name)
        with Checks(self) as check:
            both = [*self.seeds, *self.oracle_seeds]
            check("tasks", bool(self.tasks) and len(set(self.tasks)) == len(self.tasks), "one or more, each once")
            check("seeds", bool(self.seeds) and len(set(both)) == len(both), "one or more, each once in all")
            check("oracle_seeds", bool(self.oracle_seeds), "one or more, none of the scored ones")
            check("places", self.places >= 1, "must be >= 1")
            for name in (BARE, RANDOM, self.subject, self.reference):
                check("arms", name in self.arms and self.arms[name].scored, f"there must be an arm {name}, scored")
            bare = self.arms.get(BARE)
            check("arms", bare is None or (bare.is_size and not bare.seeds), f"{BARE} is the host without growth")

    @property
    def scored(self) -> list[str]:
        """Arms that have a row."""
        return [name for name, arm in self.arms.items() if arm.scored]

    def measured(self, arm: str) -> bool:
        """Whether an arm runs on the seeds of the oracle."""
        return arm == RANDOM or self.arms[arm].is_size or self.arms[arm].is_plan


def read_growth_compare(path: Path, plain: dict[str, Any]) -> GrowthCompareConfig:
    """Builds the config of a comparison over tasks from plain data.

    Raises:
        ConfigError: it has problems; the text lists all of them.
    """
    arms = plain.get("arms") or {}
    if not isinstance(arms, dict) or not all(isinstance(arm, dict | None) for arm in arms.values()):
        raise ConfigError(f"{path}: compare.arms = {arms!r}: must be a mapping of names to arms")
    plain["arms"] = {name: {**defaults_of(GrowthArm), **(arm or {})} for name, arm in arms.items()}
    plain["reward"] = {**defaults_of(RewardConfig), **(plain.get("reward") or {})}
    plain.setdefault("places", 64)
    reader = Reader()
    config = reader.section(GrowthCompareConfig, plain, "compare")
    if reader.problems:
        raise ConfigError(reader.problems)
    assert isinstance(config, GrowthCompareConfig)
    return config


def build_arm(arm: GrowthArm, task: GrowthTask) -> tuple[Arm, str]:
    """Builds what decides in a task, and a text that says what it is: two with the same text decide alike.

    Raises:
        ConfigError: settings of a controller are wrong.
        CheckpointError: a policy cannot be read.
    """
    seeds: Mapping[str, str] = arm.seeds.get(task.family.value, {})
    if arm.controller is None:
        if not seeds:
            return Arm(), "none"
        if arm.after is None:
            return Arm(planted=seeds), f"planted {dict(sorted(seeds.items()))}"
        after, says = arm.after, f"after {arm.after}: {dict(sorted(seeds.items()))}"
        return Arm(controller=lambda slots, seed: Planned(seeds, after)), says
    cls = controller_config_class(str(arm.controller.get("kind")))
    reader = Reader()
    config = reader.section(cls, {**defaults_of(cls), **arm.controller}, "compare.arms.controller")
    if reader.problems:
        raise ConfigError(reader.problems)
    if not isinstance(config, PolicyConfig):
        return Arm(controller=config), repr(config)
    path, where = find_policy(config)
    agent, _, digest = load_policy(path, where)
    return Arm(controller=agent, sampled=config.mode is Mode.SAMPLED), f"policy {digest} {config.mode.value}"
