"""Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347), recurrent, masked, on any number of ranks.

    advantages -> for each epoch: deal environments to minibatches
                  for each minibatch: judge the recorded decisions again -> losses -> gradient -> add up -> stop or step

    ratio   = exp(log_prob now - log_prob then)
    pg_loss = mean of max(-A * ratio, -A * clip(ratio, 1 - c, 1 + c))
    v_loss  = mean of 0.5 * (V - return)^2
    loss    = pg_loss + value * v_loss - entropy * mean entropy

In the first ``value_updates`` updates pg_loss is the KL of the new policy from the old, (ratio - 1) - log ratio, and
entropy has no weight: values are fitted to the policy at hand, which stays what it is.

The joint log-probability is the sum over the heads that matter, so there is one ratio and one clip. A minibatch has
whole environments, and the core is run again over all T rows from its recorded first state. Values are not clipped
(Andrychowicz et al. 2021, arXiv 2006.05990, found that it hurts).

What travels: at each epoch three sums per minibatch, at each step the gradient and a handful of sums, in float64. A
minibatch is one of *all* ranks' environments: means, deviations, KL, the stop and the clip of the norm are of the
whole, and each rank's part of the loss is a sum over its rows divided by the rows of all. So N ranks compute what one
process would that held every environment, up to reassociation, and no rank leaves the loop alone.

Everything is float32, log-probabilities and values too. Under autocast a forward without gradients must not share a
region with one that has them: weights cast in the first are taken from a cache in the second, without a gradient. A
parameter that gets none is therefore an error.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from esper.leyline.errors import ConfigError, DivergedError, EsperError
from esper.simic.ppo.config import PPOConfig, at
from esper.simic.ppo.gae import estimate_advantages
from esper.simic.ppo.measures import Sums, Update, describe_rollout, finish
from esper.simic.ppo.normal import ReturnScale
from esper.simic.ppo.ranks import MAX, SUM, Ranks, add_gradients
from esper.simic.ppo.rollout import Rollout
from esper.simic.ppo.seeds import Purpose, make_generator
from esper.tamiyo.policy.agent import Agent, Judged
from esper.tamiyo.policy.heads import Batch


@dataclass(frozen=True, slots=True)
class Minibatch:
    """Some environments of a rollout, on this rank; all of [T, n]. It may have none.

    Fields:
        envs: their numbers on this rank.
        advantages: normalised over the minibatch of all ranks.
        returns: what the values are to predict.
        valid: rows that are decisions.
        rows: number of valid rows over all ranks.
    """

    envs: Tensor
    advantages: Tensor
    returns: Tensor
    valid: Tensor
    rows: float


class PPO:
    """Learns from rollouts.

    Args:
        agent: learns; equal on all ranks at the beginning.
        config: how.
        ranks: that learn together.
        envs: environments of each rank.
        seed: of the order of minibatches; equal on all ranks.

    Raises:
        ConfigError: the number of environments of all ranks is no multiple of ``minibatches``.
    """

    def __init__(self, agent: Agent, config: PPOConfig, ranks: Ranks, *, envs: int, seed: int) -> None:
        total = envs * ranks.size
        if total % config.minibatches:
            raise ConfigError(
                f"minibatches = {config.minibatches}: must divide the {total} environments ({envs} on each of "
                f"{ranks.size} ranks)"
            )
        self.agent, self.config, self._ranks, self._envs, self._seed = agent, config, ranks, envs, seed
        self.optimizer = torch.optim.Adam(agent.parameters(), lr=config.lr, eps=config.adam_eps)
        self.scale = ReturnScale(envs, config.gamma, enabled=config.scale_rewards)
        self.steps = 0  # optimizer steps done

    def update(self, rollout: Rollout, number: int, progress: float) -> Update:
        """Learns from one rollout.

        Args:
            rollout: of this rank.
            number: of the update, from 0.
            progress: share of the training that is done, 0 to 1.

        Raises:
            DivergedError: the gradient is not finite, on every rank alike.
            EsperError: a parameter has no gradient.
        """
        config = self.config
        lr, clip = at(config.lr, config.lr_end, progress), at(config.clip, config.clip_end, progress)
        entropy = at(config.entropy, config.entropy_end, progress)
        values_alone = number < config.value_updates
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scale.take(rollout.rewards, rollout.done, rollout.valid, self._ranks)
        advantages, returns = self.estimate(rollout)
        tally = Sums()
        stopped = False
        for epoch in range(config.epochs):
            for minibatch in self.deal(rollout, advantages, returns, number, epoch):
                sums = self.add_gradients(rollout, minibatch, clip, entropy, values_alone)
                tally.add(sums)
                if self.is_too_far(sums):
                    stopped = True
                    break
                if minibatch.rows:
                    tally.norms.append(self.step())
            if stopped:
                break
        tops = self._ranks.all_reduce(torch.tensor(tally.tops, dtype=torch.float64), MAX, what="largest ratio")
        rows = describe_rollout(rollout, returns, self._ranks)
        return finish(tally, tops.tolist(), rows, lr=lr, sigma=self.scale.sigma, stopped=stopped)

    def estimate(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Returns advantages and returns [T, N], in units of the scale of returns."""
        return estimate_advantages(
            rollout.rewards / self.scale.sigma,
            rollout.values,
            rollout.next_values,
            rollout.terminated,
            rollout.done,
            gamma=self.config.gamma,
            lam=self.config.lam,
        )

    def deal(self, rollout: Rollout, advantages: Tensor, returns: Tensor, number: int, epoch: int) -> list[Minibatch]:
        """Deals the environments of all ranks to minibatches, and normalises the advantages of each over all ranks."""
        total = self._envs * self._ranks.size
        generator = make_generator(self._seed, Purpose.MINIBATCHES, number, epoch)  # the same on every rank
        order = torch.randperm(total, generator=generator).reshape(self.config.minibatches, -1)
        first = self._envs * self._ranks.rank
        shares = [part[(part >= first) & (part < first + self._envs)] - first for part in order]
        shares = [share.sort().values.to(advantages.device) for share in shares]
        weights = self.weigh(rollout)
        sums = torch.stack([_moments(advantages[:, share], weights[:, share]) for share in shares])
        minibatches = []
        for share, (count, mean, square) in zip(shares, self._ranks.all_reduce(sums, SUM, what="advantages").tolist()):
            chosen = advantages[:, share]
            if self.config.normalize_advantages and count > 1:
                mean, square = mean / count, square / count
                deviation = (max(square - mean**2, 0.0) * count / (count - 1)) ** 0.5
                chosen = (chosen - mean) / (deviation + 1e-8)
            valid = rollout.valid[:, share]
            nothing = torch.zeros_like(chosen)  # whatever stands in rows that are no decisions has no part in anything
            chosen, wanted = (torch.where(valid, x, nothing) for x in (chosen, returns[:, share]))
            minibatches.append(Minibatch(share, chosen, wanted, valid, count))
        return minibatches

    def weigh(self, rollout: Rollout) -> Tensor:
        """Returns which rows count, bool [T, N]."""
        return rollout.valid

    def judge(self, rollout: Rollout, envs: Tensor) -> Judged:
        """Judges the recorded decisions of some environments by the agent as it is now."""
        observation: Batch = {name: rows[:, envs] for name, rows in rollout.observation.items()}
        actions = {head: options[:, envs] for head, options in rollout.actions.items()}
        judged: Judged = self.agent(observation, rollout.state[envs], rollout.starts[:, envs], actions)
        return judged

    def add_gradients(
        self, rollout: Rollout, minibatch: Minibatch, clip: float, entropy: float, values_alone: bool = False
    ) -> Sums:
        """Leaves the gradient of the whole minibatch's loss in the parameters, and returns its sums over all ranks."""
        self.optimizer.zero_grad(set_to_none=True)
        parameters = [parameter for parameter in self.agent.parameters() if parameter.requires_grad]
        sums = Sums()
        if len(minibatch.envs):
            judged = self.judge(rollout, minibatch.envs)
            then = rollout.log_prob[:, minibatch.envs]
            log_ratio = torch.where(minibatch.valid, judged.log_prob - then, torch.zeros_like(then))
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - clip, 1 + clip)
            pg_loss = torch.maximum(-minibatch.advantages * ratio, -minibatch.advantages * clipped)
            if values_alone:
                pg_loss, entropy = (ratio - 1) - log_ratio, 0.0
            v_loss = 0.5 * (judged.value - minibatch.returns) ** 2
            loss = pg_loss + self.config.value * v_loss - entropy * judged.entropy
            total = torch.where(minibatch.valid, loss, torch.zeros_like(loss)).sum() / max(minibatch.rows, 1.0)
            total.backward()
            for name, parameter in self.agent.named_parameters():
                if parameter.requires_grad and parameter.grad is None:
                    raise EsperError(
                        f"parameter {name}: no gradient; a head that no decision uses, a detached tensor, or autocast "
                        "around a forward without gradients (its cached weights have none)"
                    )
            sums = Sums.of(judged, minibatch.valid, log_ratio, ratio, pg_loss, v_loss, clip)
        heads = list(rollout.actions)
        return sums.replaced(add_gradients(parameters, sums.vector(heads), self._ranks), heads)

    def is_too_far(self, sums: Sums) -> bool:
        """Whether an update ends before this step: by the KL of all ranks, so all say the same."""
        target = self.config.target_kl
        return target is not None and sums.approx_kl > 1.5 * target

    def step(self) -> float:
        """Takes one optimizer step; returns the norm of the gradient before it is clipped.

        Raises:
            DivergedError: it is not finite.
        """
        limit = self.config.max_grad_norm if self.config.max_grad_norm is not None else float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.agent.parameters(), limit))
        if not norm < float("inf"):
            raise DivergedError(
                f"the policy's gradient is {norm} at optimizer step {self.steps}; go on from an earlier checkpoint "
                "with a lower lr"
            )
        self.optimizer.step()
        self.steps += 1
        return norm


def _moments(advantages: Tensor, valid: Tensor) -> Tensor:
    """Count, sum and sum of squares over valid rows, float64 [3] on the CPU."""
    kept = advantages[valid].double()
    return torch.stack([valid.sum().double(), kept.sum(), (kept**2).sum()]).cpu()
