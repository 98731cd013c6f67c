"""Rollouts: what N environments showed in T steps, kept exactly as the agent saw it, so that learning can see it again.

    row t:   observation (masks inside) -> decision -> reward, terminated, truncated
    starts:  row t is the first of an episode; the core's state is zeroed before it
    state:   of the core before row 0; the rest of the states follows from the rows

Where an episode ends, the environment has already begun the next one (``SAME_STEP``), and shows the last observation of
the old one apart (``final_obs``). Its value stands for what was cut off, if it was cut off. It is asked for with the
state that the core had then, which is not reset, and with the masks of that observation.

Shapes: T steps, N environments of this rank, H width of the core.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from torch import Tensor

from esper.leyline.errors import EsperError
from esper.tamiyo.policy.agent import Agent
from esper.tamiyo.policy.heads import Batch

_DTYPES = {np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.bool_)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """An episode that ended within a rollout.

    Fields:
        env: number of its environment on this rank.
        total: sum of its rewards as the environment paid them.
        ticks: its length in steps.
        truncated: it was cut off.
    """

    env: int
    total: float
    ticks: int
    truncated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """T steps of N environments.

    Fields:
        observation: rows [T, N], masks under names that start with ``mask_``.
        actions: option per head, int64 [T, N].
        log_prob: of the decision when it was taken, float32 [T, N].
        values: expected returns when it was taken, in units of the scale of returns, float32 [T, N].
        next_values: values of what followed; of the final observation where an episode was cut off, 0 where it
            terminated. [T, N].
        rewards: as the environment paid them, float32 [T, N].
        terminated: bool [T, N].
        truncated: bool [T, N].
        starts: bool [T, N].
        valid: bool [T, N]: rows that are decisions. Others have no part in losses and statistics.
        state: of the core before row 0, [N, 2H].
        episodes: those that ended.
        state_rms: root mean square of the core's state over all rows.
    """

    observation: Batch
    actions: Batch
    log_prob: Tensor
    values: Tensor
    next_values: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    starts: Tensor
    valid: Tensor
    state: Tensor
    episodes: tuple[Episode, ...]
    state_rms: float

    @property
    def done(self) -> Tensor:
        """Bool [T, N]: the episode ended with this step."""
        return self.terminated | self.truncated


def read_observation(arrays: Mapping[str, Any], device: torch.device) -> Batch:
    """Copies an observation to tensors on a device.

    Raises:
        EsperError: an array is neither float32 nor int64 nor bool.
    """
    tensors = {}
    for name, array in arrays.items():
        if np.asarray(array).dtype not in _DTYPES:
            raise EsperError(
                f"observation {name!r}: {np.asarray(array).dtype}; environments give float32, int64 or bool arrays"
            )
        tensors[name] = torch.from_numpy(np.array(array)).to(device)  # a copy: an environment may use its arrays again
    return tensors


def read_final(infos: Mapping[str, Any], rows: np.ndarray, device: torch.device) -> Batch:
    """Reads the final observations of some environments.

    Args:
        infos: of a step. ``final_obs`` is an array of observations, as Gymnasium's own environments give it, or an
            observation with leading axis N.
        rows: which environments, their numbers.
        device: for the tensors.

    Raises:
        EsperError: there is none for one of them.
    """
    final = infos.get("final_obs")
    if isinstance(final, Mapping):
        return read_observation({name: np.asarray(array)[rows] for name, array in final.items()}, device)
    chosen: list[Mapping[str, Any]] = []
    for row in rows.tolist():
        if final is None or final[row] is None:
            raise EsperError(f"environment {row}: cut off without infos['final_obs'], whose value stands for the rest")
        chosen.append(final[row])
    return read_observation({name: np.stack([one[name] for one in chosen]) for name in chosen[0]}, device)


class Collector:
    """Drives an agent in a vector environment, rollout by rollout; episodes go on from one to the next.

        start -> collect -> collect -> ...

    Args:
        env: a vector environment with ``SAME_STEP`` autoreset whose observations are dicts of arrays.
        agent: decides; on any device.
        generators: of the draws, one per environment, on the CPU.

    Raises:
        EsperError: the environment resets in another way.
    """

    def __init__(self, env: VectorEnv, agent: Agent, generators: list[torch.Generator]) -> None:
        if env.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
            raise EsperError(
                f"{type(env).__name__}: autoreset mode {env.metadata.get('autoreset_mode')}; PPO needs an environment "
                "that begins the next episode within the step that ends one: metadata['autoreset_mode'] = SAME_STEP"
            )
        if len(generators) != env.num_envs:
            raise EsperError(f"{len(generators)} generators for {env.num_envs} environments; give one for each")
        self.env, self.agent, self.generators = env, agent, generators
        self._device = next(agent.parameters()).device
        self._arrays: Mapping[str, Any] = {}
        self._state = agent.begin(env.num_envs)
        self._starts = np.ones(env.num_envs, dtype=bool)
        self._valid = np.ones(env.num_envs, dtype=bool)
        self._totals, self._ticks = np.zeros(env.num_envs), np.zeros(env.num_envs, dtype=np.int64)

    def start(self, seeds: list[int]) -> None:
        """Begins an episode in every environment, each with a seed of its own."""
        arrays, infos = self.env.reset(seed=seeds)  # type: ignore[arg-type]  # a list is what Gymnasium documents
        self._arrays, self._valid = arrays, self._read_valid(infos)
        self._state = self.agent.begin(self.env.num_envs)
        self._starts[:] = True
        self._totals[:], self._ticks[:] = 0.0, 0

    def collect(self, ticks: int) -> Rollout:
        """Takes every environment ``ticks`` steps further.

        Raises:
            EsperError: an observation or a reward cannot be used.
        """
        first = self._reset(self._state, torch.from_numpy(self._starts.copy()))
        state, squares = first, 0.0
        rows: list[tuple[Any, ...]] = []
        episodes: list[Episode] = []
        for _ in range(ticks):
            starts = torch.from_numpy(self._starts.copy()).to(self._device)
            state = self._reset(state, starts)
            observation = read_observation(self._arrays, self._device)
            decision = self.agent.act(observation, state, generators=self.generators)
            valid = torch.from_numpy(self._valid.copy())
            actions = {head: option.cpu().numpy() for head, option in decision.actions.items()}
            self._arrays, rewards, terminated, truncated, infos = self.env.step(actions)
            rewards = np.asarray(rewards, dtype=np.float64)
            if not np.isfinite(rewards).all():
                env = int(np.flatnonzero(~np.isfinite(rewards))[0])
                raise EsperError(f"environment {env}: reward {rewards[env]} after {self._ticks[env] + 1} steps")
            terminated, truncated = np.array(terminated, dtype=bool), np.array(truncated, dtype=bool)
            state = decision.state
            squares += float(state.double().pow(2).mean()) if state.numel() else 0.0
            after = self._value_of_final(infos, terminated, truncated, state)
            self._note_episodes(rewards, terminated, truncated, episodes)
            self._starts, self._valid = terminated | truncated, self._read_valid(infos)
            rows.append((observation, decision, torch.from_numpy(rewards), terminated, truncated, starts, valid, after))
        self._state = state
        last = self._reset(state, torch.from_numpy(self._starts.copy()))
        bootstrap = self.agent.value(read_observation(self._arrays, self._device), last)
        observations, decisions, rewards_, ends, cuts, starts_, valids, afters = zip(*rows, strict=True)
        values = torch.stack([decision.value for decision in decisions])
        done = torch.from_numpy(np.stack(ends) | np.stack(cuts)).to(self._device)
        next_values = torch.where(done, torch.stack(afters), torch.cat([values[1:], bootstrap[None]]))
        return Rollout(
            observation={name: torch.stack([o[name] for o in observations]) for name in observations[0]},
            actions={head: torch.stack([d.actions[head] for d in decisions]) for head in decisions[0].actions},
            log_prob=torch.stack([decision.log_prob for decision in decisions]),
            values=values,
            next_values=next_values,
            rewards=torch.stack(rewards_).float().to(self._device),
            terminated=torch.from_numpy(np.stack(ends)).to(self._device),
            truncated=torch.from_numpy(np.stack(cuts)).to(self._device),
            starts=torch.stack(starts_),
            valid=torch.stack(valids).to(self._device),
            state=first,
            episodes=tuple(episodes),
            state_rms=(squares / ticks) ** 0.5,
        )

    def _reset(self, state: Tensor, starts: Tensor) -> Tensor:
        """The state of the core with zeros where an episode starts."""
        return torch.where(starts.to(state.device)[:, None], torch.zeros_like(state), state)

    def _read_valid(self, infos: Mapping[str, Any]) -> np.ndarray:
        """Which environments want a decision now: ``infos["valid"]``, bool [N]; all of them where there is none."""
        return np.array(infos.get("valid", np.ones(self.env.num_envs)), dtype=bool)

    def _value_of_final(
        self, infos: Mapping[str, Any], terminated: np.ndarray, truncated: np.ndarray, state: Tensor
    ) -> Tensor:
        """Values [N] of the final observations of episodes that were cut off; 0 elsewhere."""
        values = torch.zeros(self.env.num_envs, device=self._device)
        rows = np.flatnonzero(truncated & ~terminated)  # an episode that ended by itself has nothing more to come
        if len(rows):
            where = torch.from_numpy(rows).to(self._device)
            values[where] = self.agent.value(read_final(infos, rows, self._device), state[where])
        return values

    def _note_episodes(
        self, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, episodes: list[Episode]
    ) -> None:
        self._totals += rewards
        self._ticks += self._valid
        for env in np.flatnonzero(terminated | truncated).tolist():
            total, ticks = float(self._totals[env]), int(self._ticks[env])
            episodes.append(Episode(env=env, total=total, ticks=ticks, truncated=not bool(terminated[env])))
            self._totals[env], self._ticks[env] = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        """Returns where the episodes are: the core's state, the observation, running sums, and the random streams."""
        return {
            "arrays": {name: torch.from_numpy(np.array(array)) for name, array in self._arrays.items()},
            "state": self._state.cpu(),
            "starts": torch.from_numpy(self._starts.copy()),
            "valid": torch.from_numpy(self._valid.copy()),
            "totals": torch.from_numpy(self._totals.copy()),
            "ticks": torch.from_numpy(self._ticks.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` returned; the environment itself must be where it was then."""
        self._arrays = {name: tensor.numpy().copy() for name, tensor in state["arrays"].items()}
        self._state = state["state"].to(self._device)
        self._starts, self._valid = state["starts"].numpy().copy(), state["valid"].numpy().copy()
        self._totals, self._ticks = state["totals"].numpy().copy(), state["ticks"].numpy().copy()
