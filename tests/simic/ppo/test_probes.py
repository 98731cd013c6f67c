"""The ladder of probes: each asks one thing of the learner, and is learned in seconds."""

import numpy as np
import pytest
import torch

from esper.simic.ppo.evaluate import play
from esper.simic.ppo.train import Training
from esper.simic.probes import make_probe
from esper.simic.probes.dac import luby
from tests.support.policies import training_of


def value(training: Training, *x: float) -> float:
    """Expected return of an observation at the beginning of an episode, as the environment pays it."""
    agent = training.agent
    return float(agent.value({"x": torch.tensor([x], dtype=torch.float32)}, agent.begin(1))) * training.ppo.scale.sigma


def learned(name: str, updates: int, **settings: float) -> Training:
    training = training_of(
        make_probe(name, 8), updates=updates, **{"ticks": 8, "lr": 1e-2, "minibatches": 2, **settings}
    )
    training.run()
    return training


def test_p1_a_constant_is_valued() -> None:
    assert abs(value(learned("one_action", 15), 0, 0) - 1) < 0.1


def test_p2_a_shown_reward_is_valued() -> None:
    training = learned("seen_reward", 25)
    assert abs(value(training, 1, 0) - 1) < 0.15
    assert abs(value(training, -1, 0) + 1) < 0.15


def test_p3_a_later_reward_is_discounted() -> None:
    training = learned("late_reward", 40, gamma=0.5)
    assert abs(value(training, 0, 0) - 0.5) < 0.1
    assert abs(value(training, 0, 1) - 1) < 0.15


def test_p4_the_better_action_is_taken() -> None:
    training = learned("two_actions", 15)
    assert play(training.agent, make_probe("two_actions", 8), episodes=4, seed=1, greedy=False).mean() > 0.8


def test_p5_the_action_follows_what_is_seen() -> None:
    training = learned("seen_action", 25)
    assert play(training.agent, make_probe("seen_action", 8), episodes=4, seed=1, greedy=False).mean() > 0.8


def test_p8_an_argument_that_matters_for_one_op_is_learned() -> None:
    training = learned("gated", 35, ticks=24, minibatches=4)
    totals = play(training.agent, make_probe("gated", 16), episodes=4, seed=1)
    assert totals.max() == 2
    assert totals.min() == 0  # those that are cut off


@pytest.mark.slow
@pytest.mark.parametrize(("hidden", "low", "high"), [(64, 0.95, 1.0), (0, 0.0, 0.4)])
def test_p7_a_cue_is_recalled_with_memory_alone(hidden: int, low: float, high: float) -> None:
    settings = {"ticks": 64, "gamma": 0.99, "lr": 2.5e-3, "entropy": 0.02, "entropy_end": 0.02}
    training = training_of(make_probe("recall", 16), updates=100, hidden=hidden, width=64, **settings)
    training.run()
    assert low <= play(training.agent, make_probe("recall", 16), episodes=8, seed=1).mean() <= high


def test_luby_is_the_published_sequence() -> None:
    assert [luby(n) for n in range(1, 16)] == [1, 1, 2, 1, 1, 2, 4, 1, 1, 2, 1, 1, 2, 4, 8]


def test_the_nearest_levels_are_the_best_of_sigmoid() -> None:
    env = make_probe("sigmoid", 4)
    env.reset(seed=3)
    for _ in range(10):
        best, at = env.best(), {name: array.copy() for name, array in env.at.items()}  # type: ignore[attr-defined]
        paid = []
        for first in range(5):
            for second in range(10):
                env.at = {name: array.copy() for name, array in at.items()}
                paid.append(env.advance({"first": np.full(4, first), "second": np.full(4, second)})[0])
        assert np.allclose(np.max(paid, axis=0), best)


def test_cartpole_falls_as_gymnasium_has_it() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    from gymnasium.envs.classic_control.cartpole import CartPoleEnv

    ours, theirs = make_probe("cartpole", 1), CartPoleEnv()
    start = ours.reset(seed=[5])[0]["x"][0]
    theirs.reset(seed=0)
    theirs.state = tuple(ours.at["state"][0])
    rng, done = np.random.default_rng(0), False
    assert gymnasium.__version__ >= "1.1"
    assert np.abs(start).max() <= 0.05
    while not done:
        action = int(rng.integers(2))
        _, _, terminated, _, infos = ours.step({"op": np.array([action])})
        shown, _, done, _, _ = theirs.step(action)
        assert bool(terminated[0]) is done
        mine = infos["final_obs"]["x"][0] if done else ours.observe()["x"][0]
        assert np.allclose(mine, shown, atol=1e-6)
