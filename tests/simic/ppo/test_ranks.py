"""Two ranks learn what one process learns that holds all environments; and none leaves a loop alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from esper.leyline.errors import LockstepError
from esper.simic.ppo.measures import Sums
from esper.simic.ppo.ppo import PPO
from esper.simic.ppo.ranks import SUM, Alone
from esper.simic.ppo.rollout import Rollout
from esper.simic.ppo.train import Training
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World
from tests.support.dist import run_distributed
from tests.support.policies import Idle, training_of

ENVS, UPDATES = 8, 3
Weights = dict[str, Tensor]


class Strict:
    """Ranks that compare what each is about to reduce, so that ranks in different loops are an error and no hang."""

    def __init__(self) -> None:
        self.world = World(WorldConfig(), ControlConfig())
        self.rank, self.size = self.world.rank, self.world.size

    def all_reduce(self, vector: Tensor, op: Any, *, what: str) -> Tensor:
        words = self.world.gather_text(f"{what} {tuple(vector.shape)}", what="comparison")
        if len(set(words)) > 1:
            raise LockstepError(f"ranks do different things: {words}")
        return self.world.all_reduce(vector, op, what=what)


def weights_of(training: Training) -> Weights:
    return {name: tensor.clone() for name, tensor in training.agent.state_dict().items()}


def train(ranks: Any, envs: int, **settings: Any) -> tuple[list[dict[str, float]], Weights, int]:
    """Numbers of each update, last weights, and how many rows of the last rollout are decisions on this rank."""
    env = Idle(envs, first=envs * ranks.rank)
    training = training_of(env, updates=UPDATES, hidden=8, ranks=ranks, width=16, seed=4, **settings)
    found: list[dict[str, float]] = []
    valid: list[int] = []
    collect = training.collector.collect

    def noting(ticks: int) -> Rollout:
        rollout = collect(ticks)
        valid.append(int(rollout.valid.sum()))
        return rollout

    training.collector.collect = noting  # type: ignore[method-assign]
    training.run(after_update=lambda update: found.append(update.numbers))
    return found, weights_of(training), valid[-1]


def train_on_a_rank(rank: int) -> tuple[list[dict[str, float]], Weights, int]:
    torch.manual_seed(100 + rank)
    return train(Strict(), ENVS // 2)


def test_two_ranks_equal_one_process() -> None:
    one, weights, _ = train(Alone(), ENVS)
    results = run_distributed(train_on_a_rank, 2)
    assert results[0][2] != results[1][2]  # the ranks have different numbers of decisions
    for numbers, theirs, _ in results:
        for ours, other in zip(one, numbers, strict=True):
            assert ours.keys() == other.keys()
            for name in set(ours) - {"charts/SPS"}:
                assert other[name] == pytest.approx(ours[name], rel=1e-4, abs=1e-6), name
        for name, tensor in weights.items():
            error = (theirs[name] - tensor).norm() / tensor.norm().clamp_min(1e-3)
            assert error < 1e-5, name


def gradients_of(ranks: Any, envs: int) -> Weights:
    """The gradient of the first minibatch."""
    env = Idle(envs, first=envs * ranks.rank)
    training = training_of(env, updates=1, hidden=8, ranks=ranks, width=16, seed=4)
    training._begin()
    rollout, ppo = training.collector.collect(24), training.ppo
    ppo.scale.take(rollout.rewards, rollout.done, rollout.valid, ranks)
    minibatch = ppo.deal(rollout, *ppo.estimate(rollout), 0, 0)[0]
    ppo.add_gradients(rollout, minibatch, 0.2, 0.01)
    return {name: parameter.grad.clone() for name, parameter in training.agent.named_parameters()}  # type: ignore[union-attr]


def gradients_on_a_rank(rank: int) -> Weights:
    torch.manual_seed(100 + rank)
    return gradients_of(Strict(), ENVS // 2)


def test_gradients_of_two_ranks_equal_those_of_one_process() -> None:
    one, results = gradients_of(Alone(), ENVS), run_distributed(gradients_on_a_rank, 2)
    for found in results:
        for name, gradient in one.items():
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp_min(1e-6), name


class FarOnOneRank(PPO):
    """What rank 1 recorded is far from what it would say now, so its own KL is beyond the target from the start."""

    def update(self, rollout: Rollout, number: int, progress: float) -> Any:
        if self._ranks.rank == 1:
            rollout = replace(rollout, log_prob=rollout.log_prob + 1.0)
        return super().update(rollout, number, progress)


class LeavesAlone(FarOnOneRank):
    """A rank leaves the loop on its own KL."""

    def add_gradients(self, *given: Any) -> Sums:
        own: list[Sums] = []
        vector = Sums.vector

        def noting(sums: Sums, heads: list[str]) -> Tensor:
            own.append(Sums(values=dict(sums.values)))
            return vector(sums, heads)

        Sums.vector = noting  # type: ignore[method-assign]
        try:
            sums = super().add_gradients(*given)
        finally:
            Sums.vector = vector  # type: ignore[method-assign]
        self.own = own[-1]
        return sums

    def is_too_far(self, sums: Sums) -> bool:
        return super().is_too_far(self.own)


def stop_on_a_rank(rank: int, kind: type[PPO]) -> tuple[list[bool], list[float], Weights] | str:
    torch.manual_seed(100 + rank)
    env = Idle(4, first=4 * rank)
    # k3 of a shift by 1 is e^-1 - 1 + 1 = 0.37 nats on rank 1, about half of that over both ranks
    training = training_of(env, updates=2, ranks=Strict(), width=16, target_kl=0.2, lr=1e-6, make_ppo=kind)
    found: list[Any] = []
    try:
        training.run(after_update=found.append)
    except LockstepError as error:
        return str(error)
    steps = [update.numbers["charts/optimizer_steps"] for update in found]
    return [update.stopped for update in found], steps, weights_of(training)


def test_one_rank_beyond_the_target_stops_nobody_alone() -> None:
    (stops, steps, weights), (others, other_steps, theirs) = run_distributed(stop_on_a_rank, 2, FarOnOneRank)
    assert stops == others
    assert steps == other_steps
    assert all(torch.equal(weights[name], theirs[name]) for name in weights)
    texts = run_distributed(stop_on_a_rank, 2, LeavesAlone)
    assert all(isinstance(text, str) and "ranks do different things" in text for text in texts)


def part_on_a_rank(rank: int) -> str:
    world = World(WorldConfig(), ControlConfig())
    training = training_of(Idle(4, first=4 * rank), updates=2, ranks=world, width=16)
    if rank == 1:
        next(training.agent.parameters()).data[0] += 1e-7
    with pytest.raises(LockstepError) as caught:
        training.run()
    return str(caught.value)


def test_ranks_with_different_weights_are_noticed() -> None:
    assert all("different policies after update 0" in text for text in run_distributed(part_on_a_rank, 2))


def test_alone_reduces_nothing() -> None:
    vector = torch.ones(2)
    assert Alone().all_reduce(vector, SUM, what="test") is vector
    assert dist.is_available()
