"""Policies of an optimizer's groups: one for an optimizer that is built here, one for an optimizer that a user made.

    Scheduled   host: lr * shape(step); new groups: with and without weight decay
    Following   host: as its owner sets it; new groups: every option as in the host's widest group, except weight decay

`esper.tolaria.growth.ownership` does the rest for both: membership, freezing, judging, clipping, saving.
"""

import math
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from esper.kasmina.slots.grown import HOST
from esper.tolaria.growth.config import OptimConfig, Schedule

Named = list[tuple[str, nn.Parameter]]
Group = dict[str, Any]


def lr_shape(config: OptimConfig, step: int, total_steps: int) -> float:
    """Multiple of the peak learning rate at an optimizer step, in [0, 1]."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule in (Schedule.CONSTANT, Schedule.PLATEAU):
        return 1.0
    if config.schedule is Schedule.WSD:
        begins = stable_until(config, total_steps) or 0
        down = 1.0 if step < begins else max(0.0, 1.0 - (step - begins) / max(1, total_steps - begins))
        return config.final_lr_fraction + (1.0 - config.final_lr_fraction) * down
    u = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    down = 0.5 * (1.0 + math.cos(math.pi * u)) if config.schedule is Schedule.COSINE else 1.0 - u
    return config.final_lr_fraction + (1.0 - config.final_lr_fraction) * down


def stable_until(config: OptimConfig, total_steps: int) -> int | None:
    """The step at which the rate begins to go down, a run's end if it never does; None if it does from the start."""
    if config.schedule is Schedule.CONSTANT:
        return total_steps
    if config.schedule is Schedule.WSD:
        return max(config.warmup_steps, total_steps - math.ceil(config.decay_share * total_steps))
    return None


class GroupPolicy(Protocol):
    """Rates and groups of one optimizer."""

    def groups_for(self, owner: str, named: Named) -> list[Group]:
        """Builds the parameter groups for an owner's parameters."""

    def host_lr(self, step: int, host: Iterable[Group]) -> float:
        """The host's rate at an optimizer step; also written into its groups if the policy sets rates."""

    def follow_host(self, groups: Iterable[Group]) -> None:
        """Copies other options that follow the host into a seed's groups, before the rates of a step are written."""

    def state_fits(self, value: Tensor, parameter: nn.Parameter) -> bool:
        """Whether a saved state tensor can belong to a parameter."""


class Scheduled:
    """The policy of an optimizer that is built from a config.

    Args:
        config: settings of the optimizer.
        total_steps: of the run, for the schedule.

    Fields:
        scale: factor of the schedule.
    """

    def __init__(self, config: OptimConfig, total_steps: int) -> None:
        self.config, self.total_steps, self.scale = config, total_steps, 1.0

    def groups_for(self, owner: str, named: Named) -> list[Group]:
        """Matrices with weight decay, vectors without."""
        decay = self.config.weight_decay if owner == HOST else self.config.seed_weight_decay
        matrices = [p for _, p in named if p.ndim > 1]
        vectors = [p for _, p in named if p.ndim <= 1]
        parts = [(matrices, decay), (vectors, 0.0)]
        return [{"params": ps, "weight_decay": wd, "owner": owner} for ps, wd in parts if ps]

    def host_lr(self, step: int, host: Iterable[Group]) -> float:
        """``lr * shape(step)``, in every group of the host."""
        lr = self.config.lr * lr_shape(self.config, step, self.total_steps) * self.scale
        for group in host:
            group["lr"] = lr
        return lr

    def follow_host(self, groups: Iterable[Group]) -> None:
        """Does nothing: all options are set at birth."""

    def state_fits(self, value: Tensor, parameter: nn.Parameter) -> bool:
        """Whether it is a number, or has the parameter's shape."""
        return value.ndim == 0 or value.shape == parameter.shape


class Following:
    """The policy of an optimizer that a user made.

    Args:
        optimizer: the user's optimizer, which holds the host alone.
        seed_weight_decay: weight decay of seeds' matrices.

    Fields:
        reference: the host's group with the most parameters; seeds follow it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, seed_weight_decay: float) -> None:
        self.decay, self.options = seed_weight_decay, tuple(optimizer.defaults)
        self.reference = max(optimizer.param_groups, key=lambda group: sum(p.numel() for p in group["params"]))

    def groups_for(self, owner: str, named: Named) -> list[Group]:
        """Groups with every option of the reference group, except the weight decay, which is 0 on vectors."""
        options = {key: self.reference[key] for key in self.options if key in self.reference}
        options["lr"] = float(self.reference["lr"])
        matrices = [(name, p) for name, p in named if p.ndim > 1]
        vectors = [(name, p) for name, p in named if p.ndim <= 1]
        groups = []
        for pairs, decay in ((matrices, self.decay), (vectors, 0.0)):
            if pairs:
                params = pairs if "param_names" in self.reference else [p for _, p in pairs]
                group = {**options, "params": params, "owner": owner}
                groups.append(group | ({"weight_decay": decay} if "weight_decay" in options else {}))
        return groups

    def host_lr(self, step: int, host: Iterable[Group]) -> float:
        """The reference group's present rate; it is the user's to set."""
        return float(self.reference["lr"])

    def follow_host(self, groups: Iterable[Group]) -> None:
        """Copies the reference group's options, except rate and decay: a scheduler may cycle momentum."""
        shared = [key for key in self.options if key in self.reference and key not in ("lr", "weight_decay")]
        for group in groups:
            group.update({key: self.reference[key] for key in shared})

    def state_fits(self, value: Tensor, parameter: nn.Parameter) -> bool:
        """Always true: some optimizers keep rows and columns (Adafactor), so only torch's own step can tell."""
        return True
