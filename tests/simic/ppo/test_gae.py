"""Advantages equal those of torchrl and stable-baselines3, and closed forms, wherever episodes end."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from esper.simic.ppo.gae import estimate_advantages

T, N = 40, 5
CASES = [(0.99, 0.95), (1.0, 0.9), (0.995, 0.0), (0.9, 1.0), (1.0, 1.0)]


def case(seed: int, ends: str = "both") -> dict[str, Tensor]:
    """Rows with ends of both kinds, within the buffer and on its last row."""
    g = torch.Generator().manual_seed(seed)
    terminated = torch.rand(T, N, generator=g) < 0.08
    truncated = ~terminated & (torch.rand(T, N, generator=g) < 0.08)
    terminated[-1, 0], truncated[-1, 0] = True, False
    truncated[-1, 1], terminated[-1, 1] = True, False
    truncated[T // 2, 2], terminated[T // 2, 2] = True, False
    if ends == "none":
        terminated, truncated = torch.zeros_like(terminated), torch.zeros_like(truncated)
    values = torch.randn(T + 1, N, generator=g)
    done = terminated | truncated
    next_values = torch.where(done, torch.randn(T, N, generator=g), values[1:])
    next_values = torch.where(terminated, torch.zeros(()), next_values)
    rewards = torch.randn(T, N, generator=g)
    return {
        "rewards": rewards,
        "values": values[:-1],
        "next_values": next_values,
        "terminated": terminated,
        "done": done,
    }


def by_hand(rows: dict[str, Tensor], gamma: float, lam: float) -> Tensor:
    """Row by row in float64, as the sum that defines the estimate."""
    r, v, ahead, term, done = (
        rows[name].double() for name in ("rewards", "values", "next_values", "terminated", "done")
    )
    delta = r + gamma * ahead * (1 - term) - v
    found = torch.zeros(T, N, dtype=torch.float64)
    for n in range(N):
        for t in range(T):
            weight = 1.0
            for k in range(t, T):
                found[t, n] += weight * delta[k, n]
                if done[k, n]:
                    break
                weight *= gamma * lam
    return found


@pytest.mark.parametrize(("gamma", "lam"), CASES)
@pytest.mark.parametrize("ends", ["both", "none"])
def test_equal_to_the_sum_that_defines_them(gamma: float, lam: float, ends: str) -> None:
    rows = case(1, ends)
    advantages, returns = estimate_advantages(**rows, gamma=gamma, lam=lam)
    assert torch.allclose(advantages.double(), by_hand(rows, gamma, lam), atol=1e-4)
    assert torch.equal(returns, advantages + rows["values"])


@pytest.mark.parametrize(("gamma", "lam"), CASES)
def test_equal_to_torchrl(gamma: float, lam: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("torchrl.objectives.value.functional", reason="extra `oracles` not installed")
    for ends in ("both", "none"):
        rows = case(2, ends)
        names = ("values", "next_values", "rewards", "done", "terminated")
        v, ahead, r, done, term = (rows[name].T[..., None] for name in names)  # [N, T, 1]
        theirs, _ = functional.generalized_advantage_estimate(gamma, lam, v, ahead, r, done, term)
        ours, _ = estimate_advantages(**rows, gamma=gamma, lam=lam)
        assert (ours - theirs[..., 0].T).abs().max() < 1e-4


@pytest.mark.parametrize(("gamma", "lam"), CASES)
def test_equal_to_stable_baselines3(gamma: float, lam: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffers = pytest.importorskip("stable_baselines3.common.buffers", reason="extra `oracles` not installed")
        from gymnasium import spaces
    for ends in ("both", "none"):
        rows = case(3, ends)
        box = spaces.Box(-1, 1, (1,), np.float32)
        buffer: Any = buffers.RolloutBuffer(T, box, box, "cpu", lam, gamma, N)
        cut = rows["done"] & ~rows["terminated"]
        buffer.rewards = (rows["rewards"] + gamma * rows["next_values"] * cut).numpy()  # as it does for a time limit
        buffer.values = rows["values"].numpy()
        starts = torch.cat([torch.zeros(1, N, dtype=torch.bool), rows["done"][:-1]])
        buffer.episode_starts = starts.float().numpy()
        buffer.compute_returns_and_advantage(rows["next_values"][-1], rows["done"][-1].float().numpy())
        ours, _ = estimate_advantages(**rows, gamma=gamma, lam=lam)
        assert np.abs(ours.numpy() - buffer.advantages).max() < 1e-4


def test_a_perfect_value_has_no_advantage() -> None:
    gamma = 0.95
    values = torch.full((T, N), 1 / (1 - gamma))
    never = torch.zeros(T, N, dtype=torch.bool)
    cut = never.clone()
    cut[7], cut[-1] = True, True  # somebody stopped looking: the rest is worth as much as ever
    advantages, _ = estimate_advantages(torch.ones(T, N), values, values, never, cut, gamma=gamma, lam=0.9)
    assert advantages.abs().max() < 1e-4
    ended, _ = estimate_advantages(torch.ones(T, N), values, values, cut, cut, gamma=gamma, lam=0.9)
    assert ended.abs().max() > 10  # the same, taken for a termination
