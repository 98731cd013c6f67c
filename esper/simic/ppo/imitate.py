"""A warm start: clone recorded decisions, then go on by PPO from there (behaviour cloning, Pomerleau 1989).

    loss = mean of -log_prob of the recorded decision  +  value * mean of 0.5 * (V - return)^2

The log-probability is the sum over heads that matter, so this is the cross-entropy of exactly those. With ``smoothing``
each head's target is the recorded option mixed with all legal ones, so that the clone stays unsure: one that is sure of
itself tries nothing else, and PPO learns nothing from that. Values learn the discounted returns of the teacher, in
units of the scale of returns, so that PPO does not begin by unlearning the policy for values that say nothing. Whoever
decides is a function from what the environments show to options: a rule, a recorded run, another policy.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from esper.leyline.errors import EsperError
from esper.leyline.fields import Checks
from esper.simic.ppo.normal import ReturnScale
from esper.simic.ppo.ranks import SUM, Ranks, add_gradients
from esper.simic.ppo.rollout import read_observation
from esper.simic.ppo.seeds import Purpose, make_generator
from esper.tamiyo.policy.agent import Agent
from esper.tamiyo.policy.heads import Batch

Decide = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, np.ndarray]]
"""From observation and info of N environments to an option per head, int64 [N]; 0 for a head that does not matter."""


@dataclass(kw_only=True, slots=True)
class ImitationConfig:
    """How recorded decisions are cloned."""

    epochs: int = 20
    """Passes over the record."""

    minibatches: int = 4
    """Parts of a pass, one optimizer step each; whole environments are dealt to them."""

    lr: float = 1e-3
    """Learning rate of Adam; to 0 in a straight line."""

    value: float = 0.5
    """Weight of the value loss."""

    smoothing: float = 0.0
    """Share of each head's weight that goes to all its legal options alike, 0 to below 1; 0: the recorded option alone.
    """

    max_grad_norm: float = 1.0
    """Norm to which the gradient is clipped."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("epochs", "minibatches"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            for name in ("lr", "max_grad_norm"):
                check(name, getattr(self, name) > 0, "must be > 0")
            check("value", self.value >= 0, "must be >= 0")
            check("smoothing", 0 <= self.smoothing < 1, "must be 0 to below 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Decisions of a teacher in N environments over T steps, from the beginning of an episode in each.

    Fields:
        observation: rows [T, N], masks inside.
        actions: options per head, int64 [T, N].
        rewards: as they were paid, [T, N].
        terminated: bool [T, N]: the task ended with this step.
        truncated: bool [T, N]: the episode was cut off with this step.
        starts: bool [T, N]: the row is the first of an episode.
        valid: bool [T, N]: the row is a decision.
    """

    observation: Batch
    actions: Batch
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    starts: Tensor
    valid: Tensor

    @property
    def done(self) -> Tensor:
        """Bool [T, N]: the episode ended with this step."""
        return self.terminated | self.truncated

    def returns(self, gamma: float) -> tuple[Tensor, Tensor]:
        """Discounted returns [T, N], and where they are known: where the record has the episode to its own end."""
        totals, known = torch.zeros_like(self.rewards), torch.zeros_like(self.valid)
        later, seen = torch.zeros_like(self.rewards[0]), torch.zeros_like(self.valid[0])
        for t in range(len(self.rewards) - 1, -1, -1):
            seen = (seen & ~self.truncated[t]) | self.terminated[t]
            later = self.rewards[t] + gamma * torch.where(self.done[t], torch.zeros_like(later), later)
            totals[t], known[t] = later, seen
        return totals, known & self.valid


def record(env: VectorEnv, decide: Decide, *, ticks: int, seeds: list[int], device: torch.device) -> Record:
    """Lets a teacher act for ``ticks`` steps in every environment.

    Args:
        env: with ``SAME_STEP`` autoreset; it is reset.
        decide: the teacher.
        ticks: T.
        seeds: of the environments' first episodes.
        device: of the record.
    """
    arrays, infos = env.reset(seed=seeds)  # type: ignore[arg-type]  # a list is what Gymnasium documents
    starts, rows = np.ones(env.num_envs, dtype=bool), []
    for _ in range(ticks):
        seen = read_observation(arrays, device)
        valid = np.array(infos.get("valid", np.ones(env.num_envs)), dtype=bool)
        actions = {head: np.asarray(option, dtype=np.int64) for head, option in decide(arrays, infos).items()}
        arrays, rewards, terminated, truncated, infos = env.step(actions)
        ends, cuts = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
        rows.append((seen, actions, np.array(rewards, dtype=np.float32), ends, cuts, starts, valid))
        starts = ends | cuts
    observations, decisions, *rest = zip(*rows, strict=True)
    paid, terminated_, truncated_, begins, valids = (torch.from_numpy(np.stack(part)).to(device) for part in rest)
    return Record(
        observation={name: torch.stack([o[name] for o in observations]) for name in observations[0]},
        actions={head: torch.from_numpy(np.stack([d[head] for d in decisions])).to(device) for head in decisions[0]},
        rewards=paid,
        terminated=terminated_,
        truncated=truncated_,
        starts=begins,
        valid=valids,
    )


def imitate(
    agent: Agent, taught: Record, config: ImitationConfig, scale: ReturnScale, ranks: Ranks, *, gamma: float, seed: int
) -> list[dict[str, float]]:
    """Clones a record; each rank has its own, of equal numbers of environments. Returns the numbers of each epoch.

    ``loss/policy`` is the cross-entropy of a decision (nats; from its smoothed target, whose own entropy it cannot fall
    below), ``loss/value`` the value loss in units of the scale.

    Args:
        agent: learns; equal on all ranks.
        taught: this rank's record.
        config: how.
        scale: takes the record's rewards in, and is the unit of values.
        ranks: that learn together.
        gamma: discount of a step.
        seed: of the order of minibatches.

    Raises:
        EsperError: a recorded option is illegal under its mask.
    """
    envs = taught.rewards.shape[1]
    if envs * ranks.size % config.minibatches:
        raise EsperError(
            f"minibatches = {config.minibatches}: must divide the {envs * ranks.size} recorded environments"
        )
    scale.take(taught.rewards, taught.done, taught.valid, ranks)
    returns, known = taught.returns(gamma)
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, eps=1e-5)
    parameters = [parameter for parameter in agent.parameters() if parameter.requires_grad]
    found = []
    for epoch in range(config.epochs):
        optimizer.param_groups[0]["lr"] = config.lr * (1 - epoch / config.epochs)
        order = torch.randperm(envs * ranks.size, generator=make_generator(seed, Purpose.MINIBATCHES, epoch))
        totals = torch.zeros(4, dtype=torch.float64)
        for part in order.reshape(config.minibatches, -1):
            share = part - envs * ranks.rank
            share = share[(share >= 0) & (share < envs)].sort().values.to(returns.device)
            counts = torch.stack([taught.valid[:, share].sum(), known[:, share].sum()]).double().cpu()
            rows, valued = ranks.all_reduce(counts, SUM, what="rows of the record").tolist()
            optimizer.zero_grad(set_to_none=True)
            sums = torch.zeros(2, dtype=torch.float64)
            if len(share):
                judged = agent(
                    {name: x[:, share] for name, x in taught.observation.items()},
                    agent.begin(len(share)),
                    taught.starts[:, share],
                    {head: x[:, share] for head, x in taught.actions.items()},
                    config.smoothing,
                )
                error = 0.5 * (judged.value - returns[:, share] / scale.sigma) ** 2
                policy = -judged.log_prob[taught.valid[:, share]].sum()
                value = error[known[:, share]].sum()
                (policy / max(rows, 1.0) + config.value * value / max(valued, 1.0)).backward()
                sums = torch.stack([policy, value]).detach().double().cpu()
            sums = add_gradients(parameters, sums, ranks)
            torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            totals += torch.tensor([float(sums[0]), rows, float(sums[1]), valued])
        policy_sum, rows, value_sum, valued = totals.tolist()
        found.append({"loss/policy": policy_sum / max(rows, 1.0), "loss/value": value_sum / max(valued, 1.0)})
    return found
