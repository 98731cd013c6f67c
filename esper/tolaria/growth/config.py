"""Settings of the optimizer."""

from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.fields import Checks
from esper.leyline.slots import sort_slots


class OptimizerKind(StrEnum):
    """torch.optim.SGD or torch.optim.AdamW."""

    SGD = "sgd"
    ADAMW = "adamw"


class Schedule(StrEnum):
    """Shape of the learning rate over the run, after warm-up."""

    CONSTANT = "constant"
    COSINE = "cosine"
    LINEAR = "linear"
    PLATEAU = "plateau"
    WSD = "wsd"


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """One optimizer for the host and all seeds, each in a parameter group of its own."""

    kind: OptimizerKind = OptimizerKind.ADAMW
    """``sgd`` or ``adamw``: torch.optim.SGD or torch.optim.AdamW."""

    lr: float = 1e-3
    """Peak learning rate of the host."""

    weight_decay: float = 0.0
    """Weight decay of the host: decoupled for adamw, L2 for sgd; not applied to tensors of one axis."""

    momentum: float = 0.9
    """Momentum; sgd only."""

    beta1: float = 0.9
    """Decay of the first moment's average per step; adamw only."""

    beta2: float = 0.999
    """Decay of the second moment's average per step; adamw only."""

    eps: float = 1e-8
    """Added to the denominator of an update; adamw only."""

    fused: bool | None = None
    """One kernel for a whole parameter group, and gradients judged on the device, so that no step waits for it; null:
    on GPUs only.
    """

    schedule: Schedule = Schedule.COSINE
    """Shape of the learning rate after warm-up: ``constant``, ``cosine``, ``linear``, ``wsd``: at its peak, then
    linearly down over the last ``decay_share`` of the run, or ``plateau``: cut where trainer.watch does not improve.
    """

    plateau_factor: float = 0.1
    """Factor of a cut; plateau only."""

    plateau_patience: int = 10
    """Measured ticks without an improvement that are let pass before a cut; plateau only."""

    decay_share: float = 0.2
    """Share of the run's steps, 0 to 1, over which ``wsd`` decays."""

    warmup_steps: int = 0
    """Optimizer steps of the host's linear warm-up; 0: none."""

    final_lr_fraction: float = 0.1
    """Share of the peak learning rate at the last step, 0 to 1; cosine, linear and wsd."""

    clip_norm: float | None = 1.0
    """L2 norm to which each owner's gradient (host, each slot) is clipped by itself; null: no clipping."""

    clip_norms: dict[str, float] | None = None
    """Norms of some owners that differ from ``clip_norm``, by name: {host: 0.5, r0c0: 2.0}; null: none does."""

    seed_lr_scale: float = 2.0
    """Learning rate of seeds as a multiple of the host's at the same step."""

    seed_warmup_steps: int = 20
    """Optimizer steps of a seed's linear warm-up, from the first step in which it learns; 0: none."""

    seed_weight_decay: float = 0.0
    """Weight decay of seeds."""

    vanishing_rms: float = 1e-8
    """Root mean square of a tensor's gradient below which it counts as vanishing. The default is where AdamW's ``eps``
    begins to swallow updates.
    """

    exploding_rms: float = 100.0
    """Root mean square of a tensor's gradient above which it counts as exploding."""

    health_every: int = 10
    """Optimizer steps between two samples of gradient health; the first step after a tick is always sampled."""

    def norm_of(self, owner: str) -> float | None:
        """L2 norm to which an owner's gradient is clipped; None: it is not."""
        return (self.clip_norms or {}).get(owner, self.clip_norm)

    def __post_init__(self) -> None:
        sort_slots(owner for owner in self.clip_norms or () if owner != "host")
        with Checks(self) as check:
            check("lr", self.lr > 0, "must be > 0")
            for name in ("weight_decay", "seed_weight_decay"):
                check(name, getattr(self, name) >= 0, "must be >= 0")
            for name in ("momentum", "beta1", "beta2"):
                check(name, 0 <= getattr(self, name) < 1, "must be in [0, 1)")
            check("eps", self.eps > 0, "must be > 0")
            for name in ("warmup_steps", "seed_warmup_steps"):
                check(name, getattr(self, name) >= 0, "optimizer steps, must be >= 0")
            check("decay_share", 0 <= self.decay_share <= 1, "must be in [0, 1]")
            check("final_lr_fraction", 0 <= self.final_lr_fraction <= 1, "must be in [0, 1]")
            check("clip_norm", self.clip_norm is None or self.clip_norm > 0, "must be > 0, or null for no clipping")
            own = self.clip_norms or {}
            check("clip_norms", all(norm > 0 for norm in own.values()), "must be > 0 each, or null")
            check("plateau_factor", 0 < self.plateau_factor < 1, "must be > 0 and < 1")
            check("plateau_patience", self.plateau_patience >= 0, "ticks, must be >= 0")
            check("seed_lr_scale", self.seed_lr_scale > 0, "must be > 0")
            check("vanishing_rms", self.vanishing_rms >= 0, "must be >= 0")
            check("exploding_rms", self.exploding_rms > self.vanishing_rms, "must be > optim.vanishing_rms")
            check("health_every", self.health_every >= 1, "optimizer steps, must be >= 1")
