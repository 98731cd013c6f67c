"""Losses and gradients equal those of torchrl and sb3-contrib on one batch with masks."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.simic.ppo.ppo import Minibatch
from esper.simic.ppo.rollout import Rollout
from esper.simic.probes import make_probe, make_probe_agent
from esper.tamiyo.policy.heads import Recorded
from tests.support.policies import ppo_of, rollout_of

CLIP, VALUE, ENTROPY = 0.2, 0.5, 0.01
HEADS = {"first": 6, "second": 3, "third": 13}


def batch() -> tuple[Any, Rollout, Minibatch]:
    """An agent that has moved a little away from the one that acted, its rollout, and one minibatch of all of it."""
    torch.manual_seed(5)
    env = make_probe("identity", 8)
    agent = make_probe_agent(env, width=16)
    rollout = rollout_of(env, agent)
    for parameter in agent.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    ppo = ppo_of(agent, 8, minibatches=1, value=VALUE)
    ppo.scale.take(rollout.rewards, rollout.done, rollout.valid, ppo._ranks)
    advantages, returns = ppo.estimate(rollout)
    (minibatch,) = ppo.deal(rollout, advantages, returns, 0, 0)
    return ppo, rollout, minibatch


def logits_of(ppo: Any, rollout: Rollout, minibatch: Minibatch) -> tuple[dict[str, Tensor], Tensor]:
    """What the agent computes for each head [T * n, K], and its values [T * n]; both with gradients."""
    found: dict[str, Tensor] = {}

    class Listening(Recorded):
        def pick(self, head: str, logits: Tensor, mask: Tensor, matters: Tensor | None = None) -> Tensor:
            found[head] = logits.flatten(0, 1)
            return super().pick(head, logits, mask, matters)

    observation = {name: rows[:, minibatch.envs] for name, rows in rollout.observation.items()}
    x, context = ppo.agent.encode(observation)
    chooser = Listening({head: options[:, minibatch.envs] for head, options in rollout.actions.items()})
    ppo.agent.choose(x, context, observation, chooser)
    return found, ppo.agent.evaluate(x, context, observation).flatten()


def gradients(ppo: Any) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in ppo.agent.named_parameters()}


def flat(rollout: Rollout, minibatch: Minibatch, name: str) -> Tensor:
    return rollout.observation[name][:, minibatch.envs].flatten(0, 1)


def check_gradients(ppo: Any, ours: dict[str, Tensor], loss: Tensor) -> None:
    ppo.agent.zero_grad()
    loss.backward()
    for name, gradient in gradients(ppo).items():
        assert (gradient - ours[name]).abs().max() < 1e-6, name


def test_equal_to_torchrl() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torchrl", reason="extra `oracles` not installed")
        from tensordict import TensorDict
        from tensordict.nn import (
            CompositeDistribution,
            ProbabilisticTensorDictModule,
            ProbabilisticTensorDictSequential,
            TensorDictModule,
            set_composite_lp_aggregate,
        )
        from torchrl.modules import MaskedCategorical
        from torchrl.objectives import ClipPPOLoss

        ppo, rollout, minibatch = batch()
        sums = ppo.add_gradients(rollout, minibatch, CLIP, ENTROPY)
        ours = gradients(ppo)
        logits, values = logits_of(ppo, rollout, minibatch)
        with set_composite_lp_aggregate(False):
            parameters = {
                ("params", head, kind): value
                for head in HEADS
                for kind, value in (("logits", logits[head]), ("mask", flat(rollout, minibatch, f"mask_{head}")))
            }
            data = TensorDict(
                {
                    **{head: rollout.actions[head][:, minibatch.envs].flatten() for head in HEADS},
                    **{f"{head}_log_prob": torch.zeros(len(values)) for head in HEADS},
                    "advantage": minibatch.advantages.flatten()[:, None],
                    "value_target": minibatch.returns.flatten()[:, None],
                },
                [len(values)],
            )
            data["first_log_prob"] = rollout.log_prob[:, minibatch.envs].flatten()  # joint; the rest is zero
            actor = ProbabilisticTensorDictSequential(
                TensorDictModule(
                    lambda x: tuple(parameters.values()), in_keys=["advantage"], out_keys=list(parameters)
                ),
                ProbabilisticTensorDictModule(
                    in_keys=["params"],
                    out_keys=list(HEADS),
                    distribution_class=CompositeDistribution,
                    distribution_kwargs={
                        "distribution_map": dict.fromkeys(HEADS, MaskedCategorical),
                        "name_map": {head: head for head in HEADS},
                    },
                    return_log_prob=True,
                ),
            )
            critic = TensorDictModule(lambda x: values[:, None], in_keys=["advantage"], out_keys=["state_value"])
            loss = ClipPPOLoss(
                actor,
                critic,
                clip_epsilon=CLIP,
                entropy_coeff=ENTROPY,
                critic_coeff=VALUE,
                loss_critic_type="l2",
                normalize_advantage=False,
                functional=False,
            )
            loss.set_keys(action=list(HEADS), sample_log_prob=[f"{head}_log_prob" for head in HEADS])
            theirs = loss(data)
    theirs_now = {name: float(value.detach()) for name, value in theirs.items() if value.numel() == 1}
    assert abs(theirs_now["loss_objective"] - sums.mean("policy_loss")) < 1e-6
    assert abs(theirs_now["loss_critic"] - 2 * VALUE * sums.mean("value_loss")) < 1e-6  # theirs has no half
    assert abs(theirs_now["loss_entropy"] + ENTROPY * sums.mean("entropy")) < 1e-6
    total = theirs["loss_objective"] + theirs["loss_entropy"] + 0.5 * theirs["loss_critic"]
    check_gradients(ppo, ours, total)


def test_equal_to_sb3_contrib() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reason = "extra `oracles` not installed"
        module = pytest.importorskip("sb3_contrib.common.maskable.distributions", reason=reason)
    ppo, rollout, minibatch = batch()
    sums = ppo.add_gradients(rollout, minibatch, CLIP, ENTROPY)
    ours = gradients(ppo)
    logits, values = logits_of(ppo, rollout, minibatch)
    joint = module.MaskableMultiCategoricalDistribution(list(HEADS.values()))
    joint.proba_distribution(torch.cat(list(logits.values()), 1))
    joint.apply_masking(torch.cat([flat(rollout, minibatch, f"mask_{head}") for head in HEADS], 1))
    actions = torch.stack([rollout.actions[head][:, minibatch.envs].flatten() for head in HEADS], 1)
    ratio = (joint.log_prob(actions) - rollout.log_prob[:, minibatch.envs].flatten()).exp()
    advantages = minibatch.advantages.flatten()
    policy = -torch.min(advantages * ratio, advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    value = torch.nn.functional.mse_loss(minibatch.returns.flatten(), values)
    entropy = joint.entropy().mean()
    assert abs(policy.item() - sums.mean("policy_loss")) < 1e-6
    assert abs(value.item() - 2 * sums.mean("value_loss")) < 1e-6
    assert abs(entropy.item() - sums.mean("entropy")) < 1e-6
    assert 0 < sums.mean("clipfrac") < 1
    check_gradients(ppo, ours, policy + 0.5 * VALUE * value - ENTROPY * entropy)
