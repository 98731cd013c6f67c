"""Base of the probes: N environments of one kind in numpy arrays, stepped together, each with a random stream."""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv

from esper.leyline.errors import CheckpointError

Arrays = dict[str, np.ndarray]


class ProbeEnv(VectorEnv):
    """N environments. A subclass keeps all that an episode is in arrays ``self.at[name]`` of leading axis N.

    The observation is ``x``, float32 [N, F], and a mask ``mask_<head>``, bool [N, K], for each head that has one. An
    action is an option per head, int64 [N]. The next episode begins within the step that ends one; ``final_obs`` in the
    info is the observation that the old one ended with.

    Args:
        num_envs: N.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}
    heads: ClassVar[dict[str, int]]
    """Number of options of each head."""

    def __init__(self, num_envs: int) -> None:
        self.num_envs = num_envs
        self.at: Arrays = {}
        self.rngs = [np.random.default_rng(0) for _ in range(num_envs)]
        self.begin(np.arange(num_envs))
        observation = self.observe()
        self.single_observation_space = spaces.Dict({name: _space(array[0]) for name, array in observation.items()})
        self.observation_space = spaces.Dict({name: _space(array) for name, array in observation.items()})
        self.single_action_space = spaces.Dict({head: spaces.Discrete(n) for head, n in self.heads.items()})
        self.action_space = spaces.Dict(
            {head: spaces.MultiDiscrete(np.full(num_envs, n)) for head, n in self.heads.items()}
        )

    @abstractmethod
    def begin(self, rows: np.ndarray) -> None:
        """Begins an episode in some environments, given by number."""

    @abstractmethod
    def observe(self) -> Arrays:
        """Returns what every environment shows now."""

    @abstractmethod
    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Takes every environment a step further; returns rewards, terminated and truncated, each [N]."""

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Arrays, dict[str, Any]]:
        """Begins an episode everywhere; a list has a seed for each environment, a number n gives the i-th n + i."""
        if seed is not None:
            seeds = [seed + env for env in range(self.num_envs)] if isinstance(seed, int) else seed
            self.rngs = [np.random.default_rng(one) for one in seeds]
        self.begin(np.arange(self.num_envs))
        return self.observe(), {}

    def step(self, actions: Any) -> tuple[Arrays, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Takes a step; where an episode ends, the next one has begun when this returns."""
        rewards, terminated, truncated = self.advance(actions)
        done, infos = terminated | truncated, {}
        if done.any():
            final = {name: array.copy() for name, array in self.observe().items()}
            infos = {"final_obs": final, "_final_obs": done.copy()}
            self.begin(np.flatnonzero(done))
        return self.observe(), rewards, terminated, truncated, infos

    def state_dict(self) -> dict[str, Any]:
        """Returns the arrays and the random streams as plain data."""
        return {
            "at": {name: [array.dtype.str, array.tolist()] for name, array in self.at.items()},
            "rngs": [rng.bit_generator.state for rng in self.rngs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes them back.

        Raises:
            CheckpointError: they are those of another number of environments.
        """
        if len(state["rngs"]) != self.num_envs:
            raise CheckpointError(f"saved with {len(state['rngs'])} environments, this has {self.num_envs}")
        self.at = {name: np.array(values, dtype=np.dtype(kind)) for name, (kind, values) in state["at"].items()}
        for rng, saved in zip(self.rngs, state["rngs"]):
            rng.bit_generator.state = saved

    def draw(self, rows: np.ndarray, options: int) -> np.ndarray:
        """Draws one of ``options`` numbers for each environment in ``rows``, from its own stream."""
        return np.array([self.rngs[row].integers(options) for row in rows], dtype=np.int64)


def _space(array: np.ndarray) -> spaces.Space[Any]:
    if array.dtype == np.bool_:
        return spaces.MultiBinary(array.shape)
    return spaces.Box(-np.inf, np.inf, array.shape, np.dtype(array.dtype).type)
