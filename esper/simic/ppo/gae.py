"""Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438), with ends told apart.

    delta[t] = r[t] + gamma * next_v[t] * (1 - terminated[t]) - v[t]
    A[t]     = delta[t] + gamma * lambda * (1 - done[t]) * A[t + 1]

Two flags. Termination means that nothing more is to come, so the next value is zero. Truncation means that somebody
stopped looking: the value of the observation that was never acted on stands for the rest (Pardo et al. 2018, arXiv
1712.00378). After either, the next row belongs to another episode, so no advantage flows back over it.

A loop over T that is vectorised over N: a vectorised sum over T was forty times slower where episodes end often.
"""

import torch
from torch import Tensor


def estimate_advantages(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    *,
    gamma: float,
    lam: float,
) -> tuple[Tensor, Tensor]:
    """Returns advantages and the returns that the values are to predict, both float32 [T, N].

    Args:
        rewards: of the step from row t, [T, N].
        values: V of row t's observation, [T, N].
        next_values: V of the observation that followed: row t + 1's, or, where the episode ended, that of the final
            observation under the state that the core had then. Any number where it terminated. [T, N].
        terminated: bool [T, N]: the task ended with this step.
        done: bool [T, N]: the episode ended with this step, by termination or by truncation.
        gamma: discount of a step, 0 to 1.
        lam: weight of longer estimates, 0 to 1.
    """
    rewards, values = rewards.float(), values.float()
    ahead = torch.where(terminated, torch.zeros_like(values), next_values.float())
    deltas = rewards + gamma * ahead - values
    advantages = torch.empty_like(deltas)
    later = nothing = torch.zeros_like(deltas[0])
    for t in range(len(deltas) - 1, -1, -1):
        later = deltas[t] + gamma * lam * torch.where(done[t], nothing, later)
        advantages[t] = later
    return advantages, advantages + values
