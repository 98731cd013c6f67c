"""Two problems of dynamic algorithm configuration with a known optimum, written small from their papers.

Luby and Sigmoid: Biedenkapp et al. 2020, "Dynamic Algorithm Configuration: Foundation of a New Meta-Algorithmic
Framework" (ECAI), section 4; as environments: Eimer et al. 2021, "DACBench" (IJCAI, arXiv 2105.08541).
"""

import numpy as np

from esper.simic.probes.base import Arrays, ProbeEnv


def luby(number: int) -> int:
    """The number-th value of Luby's sequence, from 1: 1 1 2 1 1 2 4 1 1 2 1 1 2 4 8 ..."""
    k = number.bit_length()
    return 2 ** (k - 1) if number == 2**k - 1 else luby(number - 2 ** (k - 1) + 1)


class Luby(ProbeEnv):
    """Guess the next value of Luby's sequence out of seven powers of two. A miss pays -1; episodes have 64 steps, and
    begin at the first value. The best return is 0. The last five guesses and the share of the steps are shown.
    """

    heads = {"op": 7}
    length, shown = 64, 5

    def begin(self, rows: np.ndarray) -> None:
        """Begins at the first value."""
        self.at.setdefault("step", np.zeros(self.num_envs, dtype=np.int64))[rows] = 0
        self.at.setdefault("guesses", np.zeros((self.num_envs, self.shown), dtype=np.int64))[rows] = -1

    def observe(self) -> Arrays:
        """Shows the last guesses as columns of bits, and the number of the step in binary."""
        bits = (self.at["step"][:, None] >> np.arange(7)) & 1
        guesses = np.eye(8, dtype=np.float32)[self.at["guesses"] + 1][:, :, 1:].reshape(self.num_envs, -1)
        return {"x": np.concatenate([bits.astype(np.float32), guesses], axis=1)}

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pays -1 for a miss."""
        right = np.array([luby(int(step) + 1) for step in self.at["step"]])
        self.at["step"] = self.at["step"] + 1
        self.at["guesses"] = np.concatenate([self.at["guesses"][:, 1:], actions["op"][:, None]], axis=1)
        done = self.at["step"] == self.length
        return np.where(2 ** actions["op"] == right, 0.0, -1.0), done, np.zeros_like(done)


class Sigmoid(ProbeEnv):
    """Follow two sigmoids, of 5 and 10 levels, whose place and slope are drawn for each episode and shown.

    A step pays the product over both of 1 - |sigmoid(t) - level|; episodes have 10 steps. The best return of an episode
    takes the nearest level at each step: `best`.
    """

    heads = {"first": 5, "second": 10}
    length = 10

    def begin(self, rows: np.ndarray) -> None:
        """Draws place (normal around the middle) and slope (100 at most either way, as in the paper)."""
        curves = self.at.setdefault("curves", np.zeros((self.num_envs, 4)))
        for row in rows:
            rng = self.rngs[row]
            curves[row] = [*rng.normal(self.length / 2, self.length / 4, 2), *rng.uniform(-100, 100, 2)]
        self.at.setdefault("step", np.zeros(self.num_envs, dtype=np.int64))[rows] = 0

    def _targets(self) -> np.ndarray:
        places, slopes = self.at["curves"][:, :2], self.at["curves"][:, 2:]
        return 1 / (1 + np.exp(-np.clip(slopes * (self.at["step"][:, None] - places), -500, 500)))

    def observe(self) -> Arrays:
        """Shows the unspent share of the steps, and of each curve place, slope, and distance from its place."""
        places, slopes = self.at["curves"][:, :2] / self.length, self.at["curves"][:, 2:] / 100
        step = self.at["step"][:, None] / self.length
        ahead = 5 * (step - places) * np.sign(slopes)
        return {"x": np.concatenate([1 - step, places, slopes, ahead], axis=1).astype(np.float32)}

    def _pay(self, levels: np.ndarray) -> np.ndarray:
        return np.prod(1 - np.abs(self._targets() - levels), axis=1)

    def best(self) -> np.ndarray:
        """The best reward of this step, [N]."""
        counts = np.array(list(self.heads.values())) - 1
        return self._pay(np.round(self._targets() * counts) / counts)

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pays for nearness."""
        levels = np.stack([actions[head] / (options - 1) for head, options in self.heads.items()], axis=1)
        rewards = self._pay(levels)
        self.at["step"] = self.at["step"] + 1
        done = self.at["step"] == self.length
        return rewards, done, np.zeros_like(done)
