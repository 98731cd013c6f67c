"""Settings of PPO: its losses and steps, its schedules, and when it counts as sick."""

from dataclasses import dataclass, field

from esper.leyline.fields import Checks


@dataclass(kw_only=True, slots=True)
class AlarmConfig:
    """When the training of a policy is reported as sick. Every limit is of one update; null turns an alarm off."""

    min_entropy: float | None = 0.02
    """Entropy of a decision below which the policy has collapsed, as a share of that of the first update. Rows with one
    legal decision count as well, so the share says how much of the first choice is left.
    """

    max_kl: float | None = 0.5
    """KL divergence of the new policy from the one that acted (nats) above which an update went too far."""

    max_ratio: float | None = 100.0
    """Largest probability ratio of new to old policy over all decisions."""

    max_mismatch: float | None = 1e-3
    """Largest ``|ratio - 1|`` before the first step of an update. More than rounding means that learning does not see
    what acting saw: another state of the core, another mask, another precision.
    """

    min_explained: float | None = -1.0
    """Explained variance of the returns below which the values have collapsed."""

    max_value_loss: float | None = 100.0
    """Value loss, in units of the scale of returns squared."""

    min_head_share: float | None = 1e-4
    """Share of decisions in which a head must matter; a head that matters less learns nothing."""

    min_head_entropy: float | None = 1e-4
    """Entropy of a head (nats) over the decisions in which it matters, below which it always picks the same option."""

    patience: int = 5
    """Updates in a row beyond a limit before its alarm is raised, for entropies, values and heads. It is raised again
    only after the value has come back. KL, ratio and mismatch are reported at once.
    """

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("min_entropy", "max_kl", "max_ratio", "max_mismatch", "max_value_loss"):
                value = getattr(self, name)
                check(name, value is None or value > 0, "must be > 0, or null")
            for name in ("min_head_share", "min_head_entropy"):
                value = getattr(self, name)
                check(name, value is None or value >= 0, "must be >= 0, or null")
            check("min_explained", self.min_explained is None or self.min_explained < 1, "must be < 1, or null")
            check("patience", self.patience >= 1, "must be >= 1")


@dataclass(kw_only=True, slots=True)
class PPOConfig:
    """How a policy learns from what its environments showed."""

    ticks: int = 64
    """Steps of each environment in a rollout, T."""

    gamma: float = 1.0
    """Discount of a step, 0 to 1. Growth ends by its budget, so nothing needs to be discounted there."""

    lam: float = 0.95
    """Weight of longer estimates of the advantage, 0 to 1."""

    epochs: int = 4
    """Passes over a rollout."""

    minibatches: int = 4
    """Parts of a pass, one optimizer step each. Whole environments are dealt to them, so it divides their number."""

    lr: float = 1e-3
    """Learning rate of Adam at the beginning."""

    lr_end: float = 0.0
    """Learning rate at the end; it goes there in a straight line over the updates."""

    clip: float = 0.2
    """How far the probability ratio may move a decision's weight from 1, at the beginning."""

    clip_end: float = 0.2
    """The same at the end; in a straight line."""

    entropy: float = 0.01
    """Weight of the entropy (nats, summed over heads) at the beginning."""

    entropy_end: float = 0.01
    """The same at the end; in a straight line."""

    value: float = 0.5
    """Weight of the value loss, ``0.5 * (V - return)^2`` in units of the scale of returns."""

    value_updates: int = 0
    """Updates at the beginning that fit the values alone, to what the policy at hand gets: in place of its loss and its
    entropy stands its KL from the policy that acted, since encoder and core are shared with the values.
    """

    max_grad_norm: float | None = 0.5
    """Norm to which the gradient of all parameters is clipped, once ranks have added theirs up; null: not."""

    target_kl: float | None = 0.03
    """KL divergence (nats); an update ends before a step that would begin beyond one and a half times as much. null:
    never.
    """

    normalize_advantages: bool = True
    """Advantages of a minibatch, over all ranks, get mean 0 and deviation 1."""

    scale_rewards: bool = True
    """Rewards are divided by the running scale of returns."""

    adam_eps: float = 1e-5
    """Epsilon of Adam."""

    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    """When the training counts as sick."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("ticks", "epochs", "minibatches"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            for name in ("gamma", "lam"):
                check(name, 0 <= getattr(self, name) <= 1, "must be 0 to 1")
            for name in ("lr", "clip", "clip_end", "adam_eps"):
                check(name, getattr(self, name) > 0, "must be > 0")
            for name in ("lr_end", "entropy", "entropy_end", "value", "value_updates"):
                check(name, getattr(self, name) >= 0, "must be >= 0")
            for name in ("max_grad_norm", "target_kl"):
                value = getattr(self, name)
                check(name, value is None or value > 0, "must be > 0, or null")


def at(start: float, end: float, progress: float) -> float:
    """A setting that goes in a straight line.

    Args:
        start: at the beginning.
        end: at the end.
        progress: share of the training that is done, 0 to 1.
    """
    return start + (end - start) * progress
