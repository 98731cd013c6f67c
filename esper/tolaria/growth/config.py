"""Settings of the optimizer."""

from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.checks import Checks


class OptimizerKind(StrEnum):
    """torch.optim.SGD or torch.optim.AdamW."""

    SGD = "sgd"
    ADAMW = "adamw"


class Schedule(StrEnum):
    """Shape of the learning rate over the run, after warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """One optimizer for the host and all seeds, each in a parameter group of its own.

    Fields:
        kind: sgd or adamw.
        lr: peak learning rate of the host.
        weight_decay: decoupled for adamw, L2 for sgd; not applied to tensors of one axis.
        momentum: sgd only.
        beta1, beta2, eps: adamw only.
        schedule: shape after warm-up. warmup_steps: linear warm-up of the host.
        final_lr_fraction: share of the peak at the last step, for cosine and linear.
        fused: one kernel for a whole group, and gradients judged on the device, so that no step waits for it; null: on
            GPUs alone.
        clip_norm: L2 norm to which each owner's gradient (host, each slot) is clipped by itself; null is off.
        seed_lr_scale: learning rate of seeds as a multiple of the host's at the same step.
        seed_warmup_steps: linear warm-up of a seed from the first step in which it learns.
        seed_weight_decay: weight decay of seeds.
        vanishing_rms, exploding_rms: root mean square of a tensor's gradient below which it is told as vanishing (the
            default is where AdamW's ``eps`` begins to swallow updates), above which as exploding.
        health_every: optimizer steps between two samples of gradient health; the first after a tick always is one.
    """

    kind: OptimizerKind = OptimizerKind.ADAMW
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    fused: bool | None = None
    schedule: Schedule = Schedule.COSINE
    warmup_steps: int = 0
    final_lr_fraction: float = 0.1
    clip_norm: float | None = 1.0
    seed_lr_scale: float = 2.0
    seed_warmup_steps: int = 20
    seed_weight_decay: float = 0.0
    vanishing_rms: float = 1e-8
    exploding_rms: float = 100.0
    health_every: int = 10

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("lr", self.lr > 0, "must be > 0")
            for name in ("weight_decay", "seed_weight_decay"):
                check(name, getattr(self, name) >= 0, "must be >= 0")
            for name in ("momentum", "beta1", "beta2"):
                check(name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
            check("eps", self.eps > 0, "must be > 0")
            for name in ("warmup_steps", "seed_warmup_steps"):
                check(name, getattr(self, name) >= 0, "optimizer steps, must be >= 0")
            check("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "must be in [0, 1]")
            check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "must be > 0, or null for no clipping")
            check("seed_lr_scale", self.seed_lr_scale > 0, "must be > 0")
            check("vanishing_rms", self.vanishing_rms >= 0, "must be >= 0")
            check("exploding_rms", self.exploding_rms > self.vanishing_rms, "must be > optim.vanishing_rms")
            check("health_every", self.health_every >= 1, "optimizer steps, must be >= 1")
