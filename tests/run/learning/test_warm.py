"""A new policy clones the heuristic: its commands as options, learned where they were given, before PPO goes on."""

from typing import Any

import pytest
import torch

from esper.leyline.errors import ConfigError
from esper.leyline.stages import Op
from esper.run.learning.warm import Teacher, WarmStartConfig, warm_up
from esper.run.trials.config import trial_config
from esper.run.trials.environment import make_environment
from esper.run.trials.parts import TrialMaker
from esper.run.trials.recipe import batched_trials
from esper.simic.env.tasks import Family, GrowthTask
from esper.simic.env.vector import GrowthVectorEnv
from esper.simic.ppo.config import PPOConfig
from esper.simic.ppo.imitate import ImitationConfig
from esper.simic.ppo.train import Plan, Training
from esper.tamiyo.heuristic import HeuristicController
from esper.tamiyo.heuristic_config import HeuristicConfig
from esper.tamiyo.policy.network import GrowthAgent
from esper.tamiyo.policy.options import OPTIONS, to_commands
from tests.support.policies import Idle, training_of

DIGITS = GrowthTask(name="digits", family=Family.DIGITS, width=2, depth=2, samples=200, noise=0.0, steps=48, every=4)
QUICK = {"gates.evidence": "observe", "slots.embargo_ticks": 1}
RULES = HeuristicConfig(warmup_ticks=0, life_ticks=0)


def environment(envs: int) -> GrowthVectorEnv:
    maker = TrialMaker(lambda task, seed: trial_config(task, seed, QUICK))
    return make_environment((DIGITS,), envs, seeds=2, maker=maker, make_trials=batched_trials)


def test_the_teacher_says_what_the_rules_say() -> None:
    env = environment(2)
    seen, infos = env.reset(seed=3)
    teacher, rules = Teacher(env, WarmStartConfig(teacher=RULES)), [HeuristicController(RULES, slots=(), seed=0)] * 2
    ops = set()
    for tick in range(2 * DIGITS.steps // DIGITS.every):  # into the second episode
        observations = env.observations()
        if observations[0].tick == 1:
            slots = tuple(view.slot for view in observations[0].slots)
            rules = [HeuristicController(RULES, slots=slots, seed=0) for _ in rules]
        wanted = [rule.decide(one)[:1] for rule, one in zip(rules, observations, strict=True)]
        chosen = teacher(seen, infos)
        for place, (one, commands) in enumerate(zip(observations, wanted, strict=True)):
            said = to_commands(one, {head: int(option[place]) for head, option in chosen.items()}, OPTIONS)
            told = [(c.slot, c.op, c.blueprint, c.ticks, c.target) for c in said]
            assert told == [(c.slot, c.op, c.blueprint, c.ticks, c.target) for c in commands], tick
            ops |= {command.op for command in said}
        seen, _, _, _, infos = env.step(chosen)
    assert {Op.GERMINATE, Op.ADVANCE} <= ops


def test_a_policy_starts_from_the_rules_and_ppo_goes_on() -> None:
    env = environment(4)
    torch.manual_seed(0)
    agent = GrowthAgent(width=16, hidden=8)
    training = Training(agent, env, PPOConfig(ticks=4, epochs=1, minibatches=2), Plan(updates=1, seed=1))
    imitation = ImitationConfig(epochs=12, minibatches=2, lr=1e-2)
    config = WarmStartConfig(ticks=12, teacher=RULES, imitation=imitation)
    found = warm_up(training, config, env, seed=1, device=torch.device("cpu"))
    assert found[-1]["loss/policy"] < 0.5 * found[0]["loss/policy"]
    assert float(training.ppo.scale.state_dict()["running"].abs().max()) == 0.0
    kept: list[Any] = []
    assert training.run(after_update=lambda update: kept.append(update.numbers))
    assert kept[0]["losses/mismatch"] < 1e-5


def test_plans_are_said_once_in_their_tasks_alone() -> None:
    env = environment(2)
    for plans, wanted in (({"d1": {"r0c0": "norm"}}, []), ({"digits": {"r0c0": "norm"}}, ["norm", "norm"])):
        seen, infos = env.reset(seed=3)
        config = WarmStartConfig()
        config.plans = plans  # "digits" is registered nowhere
        teacher = Teacher(env, config)
        births = []
        for _ in range(DIGITS.steps // DIGITS.every - 1):
            observations, chosen = env.observations(), teacher(seen, infos)
            for place, one in enumerate(observations):
                said = to_commands(one, {head: int(option[place]) for head, option in chosen.items()}, OPTIONS)
                births += [command.blueprint for command in said if command.op is Op.GERMINATE]
            seen, _, _, _, infos = env.step(chosen)
        assert births == wanted


def test_rules_need_hosts_that_grow() -> None:
    training = training_of(Idle(4), updates=1, gamma=0.9)
    with pytest.raises(ConfigError, match="env=growth"):
        warm_up(training, WarmStartConfig(ticks=2), training.env, seed=1, device=torch.device("cpu"))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="ticks"):
        WarmStartConfig(ticks=-1)
    with pytest.raises(ConfigError, match="d99"):
        WarmStartConfig(plans={"d99": {}})
