"""The numbers of an update, by the names under which they are logged. Each is explained in docs/policy.md.

Every number is of all ranks: sums travel with the gradient, and become means only when they have been added up.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from esper.simic.ppo.ranks import SUM, Ranks
from esper.simic.ppo.rollout import Rollout
from esper.tamiyo.policy.agent import Judged

_NAMES = ("rows", "approx_kl", "old_approx_kl", "clipfrac", "policy_loss", "value_loss", "entropy", "forced")


@dataclass(slots=True)
class Sums:
    """Sums over the valid rows of one minibatch, or of several.

    Fields:
        values: by name; those of a head under ``entropy/<head>`` and ``rows/<head>``.
        tops: the largest ratio, and the largest ``|ratio - 1|`` before the first step; of this rank.
        norms: of the gradients that were stepped with.
        last_kl: KL of the newest minibatch.
        minibatches: how many were added.
    """

    values: dict[str, float] = field(default_factory=dict)
    tops: list[float] = field(default_factory=lambda: [0.0, 0.0])
    norms: list[float] = field(default_factory=list)
    last_kl: float = 0.0
    minibatches: int = 0

    @classmethod
    def of(
        cls,
        judged: Judged,
        valid: Tensor,
        log_ratio: Tensor,
        ratio: Tensor,
        pg_loss: Tensor,
        v_loss: Tensor,
        clip: float,
    ) -> "Sums":
        """Sums of one minibatch on this rank; all tensors are [T, n].

        Args:
            judged: the recorded decisions under the agent as it is now.
            valid: rows that count.
            log_ratio: log-probability now minus then.
            ratio: its exponential.
            pg_loss: policy loss of each row.
            v_loss: value loss of each row.
            clip: of the ratio.
        """
        with torch.no_grad():
            columns = {
                "rows": torch.ones_like(ratio),
                "approx_kl": (ratio - 1) - log_ratio,  # k3 of Schulman's note: unbiased, never negative
                "old_approx_kl": -log_ratio,
                "clipfrac": ((ratio - 1).abs() > clip).float(),
                "policy_loss": pg_loss,
                "value_loss": v_loss,
                "entropy": judged.entropy,
                "forced": (judged.entropy == 0).float(),
            }
            for head, matters in judged.matters.items():
                columns[f"entropy/{head}"] = torch.where(matters, judged.entropies[head], torch.zeros_like(ratio))
                columns[f"rows/{head}"] = matters.float()
            sums = {name: float((column.double() * valid).sum()) for name, column in columns.items()}
            kept = ratio[valid]
            tops = [float(kept.max()), float((kept - 1).abs().max())] if len(kept) else [0.0, 0.0]
        return cls(values=sums, tops=tops)

    @staticmethod
    def _names(heads: list[str]) -> list[str]:
        return [*_NAMES, *(f"{kind}/{head}" for head in heads for kind in ("entropy", "rows"))]

    def vector(self, heads: list[str]) -> Tensor:
        """The sums as a float64 vector, zeros where there are none."""
        return torch.tensor([self.values.get(name, 0.0) for name in self._names(heads)], dtype=torch.float64)

    def replaced(self, vector: Tensor, heads: list[str]) -> "Sums":
        """The same with the sums of all ranks in place of this rank's."""
        return Sums(values=dict(zip(self._names(heads), vector.tolist())), tops=self.tops)

    @property
    def approx_kl(self) -> float:
        """Mean KL divergence (nats)."""
        return self.mean("approx_kl")

    def mean(self, name: str) -> float:
        """Mean over rows; of a head over the rows in which it matters. 0 without rows."""
        head = name.partition("/")[2]
        rows = self.values.get(f"rows/{head}" if head else "rows", 0.0)
        return self.values.get(name, 0.0) / rows if rows else 0.0

    def add(self, other: "Sums") -> None:
        """Adds a minibatch of the same update."""
        for name, value in other.values.items():
            self.values[name] = self.values.get(name, 0.0) + value
        mismatch = other.tops[1] if self.minibatches == 0 else self.tops[1]
        self.tops = [max(self.tops[0], other.tops[0]), mismatch]
        self.last_kl = other.approx_kl
        self.minibatches += 1


@dataclass(frozen=True, slots=True)
class Update:
    """What an update did.

    Fields:
        numbers: by the names under which they are logged.
        stopped: the KL ended it early.
    """

    numbers: dict[str, float]
    stopped: bool


def describe_rollout(rollout: Rollout, returns: Tensor, ranks: Ranks) -> dict[str, float]:
    """Numbers of a rollout over all ranks; rewards and returns of episodes are as the environment paid them.

    Args:
        rollout: of this rank.
        returns: that the values were to predict, in units of the scale of returns, [T, N].
        ranks: which add up their sums.
    """
    valid, masks = rollout.valid, sorted(name for name in rollout.observation if name.startswith("mask_"))
    kept, errors = returns[valid].double(), (returns - rollout.values)[valid].double()
    illegal = [float((~rollout.observation[name]).float().flatten(2).mean(2)[valid].double().sum()) for name in masks]
    sums = [
        *(float(valid.sum()), float(valid.numel()), float(rollout.rewards[valid].double().sum())),
        *(float(kept.sum()), float((kept**2).sum()), float(errors.sum()), float((errors**2).sum())),
        *(float(len(rollout.episodes)), sum(episode.total for episode in rollout.episodes)),
        float(sum(episode.ticks for episode in rollout.episodes)),
        float(sum(episode.truncated for episode in rollout.episodes)),
        rollout.state_rms**2 / ranks.size,
        *illegal,
    ]
    sums = ranks.all_reduce(torch.tensor(sums, dtype=torch.float64), SUM, what="numbers of the rollout").tolist()
    rows, places, reward, total, squares, error, error_squares, episodes, paid, ticks, cut, state, *shares = sums
    rows_or_1 = max(rows, 1.0)
    spread = squares / rows_or_1 - (total / rows_or_1) ** 2
    unexplained = error_squares / rows_or_1 - (error / rows_or_1) ** 2
    numbers = {
        "rollout/valid": rows / places,
        "rollout/reward": reward / rows_or_1,
        "rollout/episodes": episodes,
        "rollout/state_rms": state**0.5,
        "losses/explained_variance": 1 - unexplained / spread if spread > 1e-12 else 0.0,
    }
    if episodes:
        numbers |= {
            "charts/episodic_return": paid / episodes,
            "charts/episodic_length": ticks / episodes,
            "rollout/truncated": cut / episodes,
        }
    return numbers | {f"masks/{name[5:]}": share / rows_or_1 for name, share in zip(masks, shares)}


def finish(
    tally: Sums, tops: list[float], rollout: dict[str, float], *, lr: float, sigma: float, stopped: bool
) -> Update:
    """Puts the numbers of an update together.

    Args:
        tally: sums over its minibatches, of all ranks.
        tops: largest ratio and mismatch of all ranks.
        rollout: from `describe_rollout`.
        lr: learning rate.
        sigma: scale of returns.
        stopped: the KL ended it early.
    """
    heads = [name.partition("/")[2] for name in tally.values if name.startswith("rows/")]
    rows = max(tally.values.get("rows", 0.0), 1.0)
    numbers = {f"losses/{name}": tally.mean(name) for name in _NAMES[2:7]}
    numbers |= {
        "losses/approx_kl": tally.last_kl,
        "losses/ratio_max": tops[0],
        "losses/mismatch": tops[1],
        "losses/grad_norm": max(tally.norms, default=0.0),
        "losses/forced": tally.mean("forced"),
        "charts/learning_rate": lr,
        "charts/optimizer_steps": float(len(tally.norms)),
        "charts/stopped": float(stopped),
        "charts/return_scale": sigma,
    }
    for head in heads:
        numbers[f"heads/{head}/entropy"] = tally.mean(f"entropy/{head}")
        numbers[f"heads/{head}/share"] = tally.values[f"rows/{head}"] / rows
    return Update(numbers | rollout, stopped)
