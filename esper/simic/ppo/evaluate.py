"""Plays whole episodes with a policy that stands still: greedily, or drawn as in training."""

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from esper.simic.ppo.rollout import read_observation
from esper.simic.ppo.seeds import Purpose, make_generator, make_seed
from esper.tamiyo.policy.agent import Agent


def play(agent: Agent, env: VectorEnv, *, episodes: int, seed: int, greedy: bool = True) -> np.ndarray:
    """Returns the sums of rewards of the first ``episodes`` episodes of every environment, [N, episodes].

    The same number from each, because the first to end are the short ones.

    Args:
        agent: decides.
        env: with ``SAME_STEP`` autoreset; it is reset.
        episodes: of each environment.
        seed: of the evaluation; its streams are none that training draws from.
        greedy: take the likeliest options; else draw.
    """
    envs, device = env.num_envs, next(agent.parameters()).device
    arrays, _ = env.reset(seed=[make_seed(seed, Purpose.EVALUATION, number) for number in range(envs)])  # type: ignore[arg-type]
    generators = [make_generator(seed, Purpose.EVALUATION_ACTIONS, number) for number in range(envs)]
    totals, running = np.full((envs, episodes), np.nan), np.zeros(envs)
    counts = np.zeros(envs, dtype=np.int64)
    state = agent.begin(envs)
    while counts.min() < episodes:
        observation = read_observation(arrays, device)
        decision = agent.act(observation, state, generators=None if greedy else generators)
        actions = {head: option.cpu().numpy() for head, option in decision.actions.items()}
        arrays, rewards, terminated, truncated, _ = env.step(actions)
        running += rewards
        done = np.asarray(terminated) | np.asarray(truncated)
        for row in np.flatnonzero(done).tolist():
            if counts[row] < episodes:
                totals[row, counts[row]] = running[row]
            counts[row], running[row] = counts[row] + 1, 0.0
        state = torch.where(torch.from_numpy(done).to(device)[:, None], torch.zeros_like(state), decision.state)
    return totals
