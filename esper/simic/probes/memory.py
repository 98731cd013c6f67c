"""Probes of memory, of heads that matter for some options only, and of masks."""

import numpy as np

from esper.simic.probes.base import Arrays, ProbeEnv

WAIT, ACT = 0, 1


class Recall(ProbeEnv):
    """P7. One of four cues at step 0, eight blank steps, then the op must be ACT, and its argument the cue: pays 1.

    Before the last step only WAIT is legal, and the argument does not matter. Without memory nothing beats 1/4.
    """

    heads = {"op": 2, "argument": 4}
    blanks, cues = 8, 4

    def begin(self, rows: np.ndarray) -> None:
        """Draws a cue."""
        self.at.setdefault("cue", np.zeros(self.num_envs, dtype=np.int64))[rows] = self.draw(rows, self.cues)
        self.at.setdefault("step", np.zeros(self.num_envs, dtype=np.int64))[rows] = 0

    def observe(self) -> Arrays:
        """Shows the cue at step 0, and at the last step that now is the time."""
        x = np.zeros((self.num_envs, self.cues + 1), dtype=np.float32)
        first, last = self.at["step"] == 0, self.at["step"] > self.blanks
        x[first, self.at["cue"][first]] = 1.0
        x[:, -1] = last
        return {"x": x, "mask_op": np.stack([~last, last], axis=1)}

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pays for the right argument at the last step."""
        done = self.at["step"] > self.blanks
        hit = done & (actions["op"] == ACT) & (actions["argument"] == self.at["cue"])
        self.at["step"] = self.at["step"] + 1
        return hit.astype(np.float64), done, np.zeros_like(done)


class Gated(ProbeEnv):
    """P8. ACT pays 1 if its argument is the number shown, -1 if not; WAIT pays 0. On odd steps only WAIT is legal. One
    argument is always illegal: at step 0 the right one, so that waiting is best, and later one of the others. Episodes
    end after 6 steps, or are cut off after 2 in one of four cases. The best return is 2, of a cut one 0.
    """

    heads = {"op": 2, "argument": 3}

    def begin(self, rows: np.ndarray) -> None:
        """Draws the number, and whether the episode will be cut off."""
        for name, options in (("number", 3), ("cut", 4)):
            self.at.setdefault(name, np.zeros(self.num_envs, dtype=np.int64))[rows] = self.draw(rows, options)
        self.at.setdefault("step", np.zeros(self.num_envs, dtype=np.int64))[rows] = 0

    def observe(self) -> Arrays:
        """Shows the number, odd steps and step 0; masks follow the step."""
        odd = self.at["step"] % 2 == 1
        x = np.zeros((self.num_envs, 5), dtype=np.float32)
        x[np.arange(self.num_envs), self.at["number"]] = 1.0
        x[:, 3], x[:, 4] = odd, self.at["step"] == 0
        argument = np.ones((self.num_envs, 3), dtype=bool)
        argument[np.arange(self.num_envs), (self.at["number"] + self.at["step"]) % 3] = False
        return {"x": x, "mask_op": np.stack([np.ones_like(odd), ~odd], axis=1), "mask_argument": argument}

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pays for acts, then draws the next number."""
        right = np.where(actions["argument"] == self.at["number"], 1.0, -1.0)
        rewards = np.where(actions["op"] == ACT, right, 0.0)
        self.at["step"] = self.at["step"] + 1
        self.at["number"] = self.draw(np.arange(self.num_envs), 3)
        done = self.at["step"] == 6
        return rewards, done, ~done & (self.at["step"] == 2) & (self.at["cut"] == 0)


class Identity(ProbeEnv):
    """Masked identity: three heads (6, 3, 13 options), one option of each is right and half of the others are illegal.
    A step pays 1 if all three are right; an episode has 10 steps. Its best return is 10.
    """

    heads = {"first": 6, "second": 3, "third": 13}

    def begin(self, rows: np.ndarray) -> None:
        """Draws the first right options."""
        self.at.setdefault("step", np.zeros(self.num_envs, dtype=np.int64))[rows] = 0
        for head, options in self.heads.items():
            self.at.setdefault(head, np.zeros(self.num_envs, dtype=np.int64))
            self.at.setdefault(f"legal_{head}", np.ones((self.num_envs, options), dtype=bool))
        self._draw(rows)

    def _draw(self, rows: np.ndarray) -> None:
        for head, options in self.heads.items():
            self.at[head][rows] = self.draw(rows, options)
            legal = np.stack([self.rngs[row].random(options) < 0.5 for row in rows])
            legal[np.arange(len(rows)), self.at[head][rows]] = True
            self.at[f"legal_{head}"][rows] = legal

    def observe(self) -> Arrays:
        """Shows the right option of each head."""
        shown = [np.eye(options, dtype=np.float32)[self.at[head]] for head, options in self.heads.items()]
        masks = {f"mask_{head}": self.at[f"legal_{head}"].copy() for head in self.heads}
        return {"x": np.concatenate(shown, axis=1), **masks}

    def advance(self, actions: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Pays if all are right."""
        right = np.all([actions[head] == self.at[head] for head in self.heads], axis=0)
        self.at["step"] = self.at["step"] + 1
        self._draw(np.arange(self.num_envs))
        done = self.at["step"] == 10
        return right.astype(np.float64), done, np.zeros_like(done)
