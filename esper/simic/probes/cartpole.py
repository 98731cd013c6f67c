"""A pole on a cart (Barto, Sutton & Anderson 1983) with Gymnasium's constants; without velocities it needs memory."""

import numpy as np

from esper.simic.probes.base import Arrays, ProbeEnv

_GRAVITY, _CART, _POLE, _HALF, _FORCE, _TAU = 9.8, 1.0, 0.1, 0.5, 10.0, 0.02
_ANGLE, _PLACE, _LIMIT = 12 * 2 * np.pi / 360, 2.4, 500


class CartPole(ProbeEnv):
    """Push left or right; each step that the pole stands pays 1. Cut off after 500 steps.

    Args:
        num_envs: N.
        velocities: whether they are shown.
    """

    heads = {"op": 2}

    def __init__(self, num_envs: int, *, velocities: bool = True) -> None:
        self._shown = np.array([1, velocities, 1, velocities], dtype=np.float32)
        super().__init__(num_envs)

    def begin(self, rows: np.ndarray) -> None:
        """Draws place, speed, angle and angular speed within 0.05 of rest."""
        state = self.at.setdefault("state", np.zeros((self.num_envs, 4)))
        for row in rows:
            state[row] = self.rngs[row].uniform(-0.05, 0.05, 4)
        self.at.setdefault("step", np.zeros(self.num_envs, dtype=np.int64))[rows] = 0

    def observe(self) -> Arrays:
        """Shows place and angle, and velocities if they are shown."""
        return {"x": self.at["state"].astype(np.float32) * self._shown}

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Euler's method, as Gymnasium does it."""
        place, speed, angle, turn = self.at["state"].T
        force = np.where(actions["op"] == 1, _FORCE, -_FORCE)
        cos, sin = np.cos(angle), np.sin(angle)
        push = (force + _POLE * _HALF * turn**2 * sin) / (_CART + _POLE)
        bend = (_GRAVITY * sin - cos * push) / (_HALF * (4.0 / 3.0 - _POLE * cos**2 / (_CART + _POLE)))
        pull = push - _POLE * _HALF * bend * cos / (_CART + _POLE)
        moved = [place + _TAU * speed, speed + _TAU * pull, angle + _TAU * turn, turn + _TAU * bend]
        self.at["state"] = np.stack(moved, axis=1)
        self.at["step"] = self.at["step"] + 1
        fallen = (np.abs(self.at["state"][:, 0]) > _PLACE) | (np.abs(self.at["state"][:, 2]) > _ANGLE)
        return np.ones(self.num_envs), fallen, ~fallen & (self.at["step"] >= _LIMIT)
