"""Rewards in units of the running scale of returns, so that the value loss has one size in every task.

    R[t] = r[t] + gamma * R[t - 1]  (0 before an episode),    sigma = sqrt(mean of R^2 over everything seen)

Only a scale, never a shift: a shifted reward would pay for staying alive. It is the root mean square and not the
standard deviation, because the latter is zero where every episode pays the same. Ranks add up their sums in float64, so
all have the same sigma. It is saved with the weights, since values are predicted in units of it, and it stands still
while a policy is evaluated.
"""

from typing import Any

import torch
from torch import Tensor

from esper.leyline.errors import CheckpointError
from esper.simic.ppo.ranks import SUM, Ranks


class ReturnScale:
    """The running scale of discounted returns.

    Args:
        envs: N, environments of this rank.
        gamma: discount of a step.
        enabled: false leaves rewards as they are.
    """

    def __init__(self, envs: int, gamma: float, *, enabled: bool = True) -> None:
        self._gamma, self._enabled = gamma, enabled
        self._running = torch.zeros(envs, dtype=torch.float64)  # discounted sum of the rewards so far, per environment
        self._count, self._squares = 0.0, 0.0

    @property
    def sigma(self) -> float:
        """The scale; 1 as long as every return has been zero, or if disabled."""
        mean = self._squares / self._count if self._enabled and self._count else 0.0
        return float(mean**0.5) if mean > 0 else 1.0

    def take(self, rewards: Tensor, done: Tensor, valid: Tensor, ranks: Ranks) -> None:
        """Takes in the rewards of one rollout.

        Args:
            rewards: as the environment paid them, [T, N].
            done: bool [T, N]: the episode ended with this step.
            valid: bool [T, N]: rows that are decisions; others are left out.
            ranks: which add up their sums.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        for reward, end, counts in zip(rewards.double().cpu(), done.cpu(), valid.cpu()):
            self._running = torch.where(counts, self._gamma * self._running + reward, self._running)
            sums += torch.stack([counts.double().sum(), (self._running**2 * counts).sum()])
            self._running = torch.where(end, torch.zeros_like(self._running), self._running)
        count, squares = ranks.all_reduce(sums, SUM, what="scale of returns").tolist()
        self._count, self._squares = self._count + count, self._squares + squares

    def restart(self) -> None:
        """Every environment begins a new episode."""
        self._running = torch.zeros_like(self._running)

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums, and the running returns of this rank's environments."""
        return {"count": self._count, "squares": self._squares, "running": self._running.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back.

        Raises:
            CheckpointError: they are those of another number of environments.
        """
        if state["running"].shape != self._running.shape:
            raise CheckpointError(
                f"return scale: saved with {len(state['running'])} environments a rank, this one has "
                f"{len(self._running)}; start as many as before"
            )
        self._count, self._squares = float(state["count"]), float(state["squares"])
        self._running = state["running"].clone()
