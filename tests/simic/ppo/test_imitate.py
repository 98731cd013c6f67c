"""A cloned policy does what its teacher did, values what its teacher got, and PPO goes on from there."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from esper.leyline.errors import EsperError
from esper.simic.ppo.evaluate import play
from esper.simic.ppo.imitate import ImitationConfig, Record, imitate, record
from esper.simic.ppo.normal import ReturnScale
from esper.simic.ppo.ranks import Alone
from esper.simic.ppo.seeds import Purpose, make_seed
from esper.simic.probes import make_probe, make_probe_agent
from esper.simic.probes.memory import ACT, WAIT
from tests.support.dist import run_distributed
from tests.support.policies import Idle, training_of


def teacher(arrays: Mapping[str, Any], infos: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The best policy of `Gated`: act where the right argument is legal."""
    right = arrays["x"][:, :3].argmax(1)
    legal = arrays["mask_op"][:, ACT] & arrays["mask_argument"][np.arange(len(right)), right]
    return {"op": np.where(legal, ACT, WAIT), "argument": np.where(legal, right, 0)}


def taught(envs: int = 8, first: int = 0, ticks: int = 24) -> Record:
    seeds = [make_seed(2, Purpose.ENVIRONMENT, first + row) for row in range(envs)]
    return record(Idle(envs, first), teacher, ticks=ticks, seeds=seeds, device=torch.device("cpu"))


def test_the_clone_does_what_its_teacher_does_and_ppo_goes_on() -> None:
    training = training_of(Idle(8), updates=3, gamma=0.9, lr=3e-4)
    numbers = imitate(
        training.agent, taught(), ImitationConfig(lr=1e-2), training.ppo.scale, Alone(), gamma=0.9, seed=1
    )
    assert numbers[-1]["loss/policy"] < 0.05 < numbers[0]["loss/policy"]
    assert numbers[-1]["loss/value"] < 0.5 * numbers[0]["loss/value"]
    assert play(training.agent, make_probe("gated", 8), episodes=4, seed=5).max() == 2
    kept: list[dict[str, float]] = []
    training.run(after_update=lambda update: kept.append(update.numbers))
    assert kept[0]["losses/mismatch"] < 1e-5
    assert kept[0]["losses/explained_variance"] > 0.05  # values are good for something from the start
    assert play(training.agent, make_probe("gated", 8), episodes=4, seed=5).max() == 2


def test_a_smoothed_clone_is_as_unsure_as_it_was_told_to_be() -> None:
    training = training_of(Idle(8), updates=1)
    rows, config = taught(), ImitationConfig(lr=1e-2, epochs=60, smoothing=0.3)
    imitate(training.agent, rows, config, training.ppo.scale, Alone(), gamma=0.9, seed=1)
    with torch.no_grad():
        judged = training.agent(rows.observation, training.agent.begin(8), rows.starts, rows.actions)
    acted = judged.matters["argument"] & rows.valid
    legal = rows.observation["mask_argument"].sum(-1)[acted]  # the target: 0.7 + 0.3 / K, and 0.3 / K of each other
    right, other = 0.7 + 0.3 / legal, 0.3 / legal
    wanted = -(right * right.log() + torch.where(legal > 1, (legal - 1) * other * other.log(), 0.0))
    assert judged.entropies["argument"][acted].mean() == pytest.approx(float(wanted.mean()), rel=0.1)
    assert wanted.mean() > 0.2
    assert play(training.agent, make_probe("gated", 8), episodes=4, seed=5).max() == 2  # and its likeliest is the same


def test_returns_are_known_where_the_record_holds_the_end() -> None:
    rewards = torch.tensor([[1.0], [2.0], [4.0], [8.0], [1.0]])
    ends, cuts = torch.zeros(5, 1, dtype=torch.bool), torch.zeros(5, 1, dtype=torch.bool)
    ends[1], cuts[3] = True, True  # rows 2 and 3 were cut off, and row 4 goes on behind the record
    every = torch.ones(5, 1, dtype=torch.bool)
    parts = {"terminated": ends, "truncated": cuts, "starts": ends, "valid": every}
    returns, known = Record(observation={}, actions={}, rewards=rewards, **parts).returns(0.5)
    assert returns[:2].flatten().tolist() == [2.0, 2.0]
    assert known.flatten().tolist() == [True, True, False, False, False]


def test_an_illegal_recorded_option_is_an_error() -> None:
    rows = taught(ticks=4)
    rows.actions["op"][:] = ACT  # on odd steps only waiting is legal
    agent = make_probe_agent(Idle(8))
    with pytest.raises(EsperError, match="'op': a recorded option is illegal"):
        imitate(agent, rows, ImitationConfig(), ReturnScale(8, 0.9), Alone(), gamma=0.9, seed=1)
    with pytest.raises(EsperError, match="minibatches = 3"):
        imitate(agent, rows, ImitationConfig(minibatches=3), ReturnScale(8, 0.9), Alone(), gamma=0.9, seed=1)


def clone(ranks: Any, envs: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    agent = make_probe_agent(Idle(envs), hidden=8, width=16)
    rows = taught(envs, envs * ranks.rank)
    numbers = imitate(agent, rows, ImitationConfig(epochs=3), ReturnScale(envs, 0.9), ranks, gamma=0.9, seed=1)
    return numbers, agent.state_dict()


def clone_on_a_rank(rank: int) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    from esper.tolaria.ranks.config import ControlConfig, WorldConfig
    from esper.tolaria.ranks.world import World

    return clone(World(WorldConfig(), ControlConfig()), 4)


def test_two_ranks_clone_what_one_process_does() -> None:
    numbers, weights = clone(Alone(), 8)
    for found, theirs in run_distributed(clone_on_a_rank, 2):
        assert [pytest.approx(one, rel=1e-4) for one in numbers] == found
        assert all((theirs[name] - one).norm() <= 1e-5 * one.norm().clamp_min(1e-3) for name, one in weights.items())
