"""The ladder: six environments, each of which breaks when one part of a learner is wrong."""

from typing import ClassVar

import numpy as np

from esper.simic.probes.base import Arrays, ProbeEnv


class _Short(ProbeEnv):
    """Episodes of ``length`` steps. ``x`` is the sign of the episode if ``shown``, and the number of the step."""

    length: ClassVar[int] = 1
    shown: ClassVar[bool] = False
    heads: ClassVar[dict[str, int]] = {"op": 1}

    def begin(self, rows: np.ndarray) -> None:
        """Draws a sign for each episode."""
        self.at.setdefault("sign", np.zeros(self.num_envs, dtype=np.int64))[rows] = 2 * self.draw(rows, 2) - 1
        self.at.setdefault("step", np.zeros(self.num_envs, dtype=np.int64))[rows] = 0

    def observe(self) -> Arrays:
        """Shows sign and step."""
        sign = self.at["sign"] if self.shown else np.zeros(self.num_envs)
        return {"x": np.stack([sign, self.at["step"]], axis=1).astype(np.float32)}

    def pay(self, actions: Arrays) -> np.ndarray:
        """Returns the reward of the last step: 1."""
        return np.ones(self.num_envs)

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pays at the last step, which terminates."""
        self.at["step"] = self.at["step"] + 1
        done = self.at["step"] == self.length
        return np.where(done, self.pay(actions), 0.0), done, np.zeros_like(done)


class OneAction(_Short):
    """P1. One action, nothing seen, a reward of 1: V = 1. Asks whether the value loss is a loss."""


class SeenReward(_Short):
    """P2. The reward is the sign that is shown: V(sign) = sign. Asks whether gradients reach the encoder."""

    shown = True

    def pay(self, actions: Arrays) -> np.ndarray:
        """Returns the sign."""
        return self.at["sign"].astype(np.float64)


class LateReward(_Short):
    """P3. Two steps, a reward of 1 at the end: V of the first is gamma. Asks for the discount and for GAE."""

    length = 2


class TwoActions(_Short):
    """P4. Action 1 pays 1, action 0 pays -1. Asks for the sign of the advantage and for the policy's loss."""

    heads = {"op": 2}

    def pay(self, actions: Arrays) -> np.ndarray:
        """Returns 1 for action 1, else -1."""
        return 2.0 * actions["op"] - 1.0


class SeenAction(_Short):
    """P5. The action that the sign asks for pays 1, the other -1. Asks whether rows of a batch keep together."""

    heads, shown = {"op": 2}, True

    def pay(self, actions: Arrays) -> np.ndarray:
        """Returns 1 if action and sign agree, else -1."""
        return np.where((actions["op"] == 1) == (self.at["sign"] == 1), 1.0, -1.0)


class CutOff(ProbeEnv):
    """P6. A reward of 1 for ever, cut off after two steps: V = 1 / (1 - gamma). Asks for the bootstrap.

    As a termination the same would be worth 1 + gamma at most.
    """

    heads = {"op": 1}

    def begin(self, rows: np.ndarray) -> None:
        """Begins at step 0."""
        self.at.setdefault("step", np.zeros(self.num_envs, dtype=np.int64))[rows] = 0

    def observe(self) -> Arrays:
        """Shows nothing, since every step is like the last."""
        return {"x": np.ones((self.num_envs, 1), dtype=np.float32)}

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pays 1."""
        self.at["step"] = self.at["step"] + 1
        cut = self.at["step"] == 2
        return np.ones(self.num_envs), np.zeros_like(cut), cut
