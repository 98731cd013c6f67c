"""Settings of the training engine: optimizer, trainer, lockstep, checkpoints, governor, world."""

from dataclasses import dataclass
from enum import StrEnum

from esper.leyline.fields import Checks


class Device(StrEnum):
    """CPU: gloo. GPU: one CUDA device a rank, NCCL for data, gloo for control."""

    CPU = "cpu"
    GPU = "gpu"


@dataclass(kw_only=True, slots=True)
class ControlConfig:
    """The control tick and the lockstep protocol."""

    every: int = 50
    """Optimizer steps between ticks; 0: a tick at each epoch's end, and at least every ``max_steps``."""

    max_steps: int = 200
    """Optimizer steps between two ticks at most."""

    digest_every: int = 4
    """Ticks between digests of all parameters; live seeds are digested at every tick."""

    validate_every: int = 1
    """Ticks between validations."""

    attribute_every: int = 0
    """Ticks between measurements of what each blended seed is worth on the validation part: alone, left out, and its
    Shapley value; the last tick of a run has one, too. 0: never. Each takes up to 2^n forwards of
    ``gates.probe_samples`` samples for n seeds up to 4, and up to 16 n beyond. No gate decides by it.
    """

    stage_ticks: int = 4
    """Ticks that a staged seed may stay not ready before it is discarded."""

    timeout_s: float = 60.0
    """Seconds after which a missing rank is an error, in every process group. In a session of a user's own loop: for
    which the beat of a rank may stand still; one that beats is waited for, up to torch's limit of 30 minutes.
    """

    slow_timeout_s: float = 300.0
    """The same for what may rightly take longer: the step after a growth, a save, or a save's commit. Seconds. A
    session does not need it.
    """

    startup_timeout_s: float = 300.0
    """The same for start-up, load, the last save and the final test. Seconds."""

    def attributes(self, tick: int, *, last: bool = False) -> bool:
        """Whether an attribution is due at this tick; the last tick of a run has one, too."""
        return self.attribute_every > 0 and (last or tick % self.attribute_every == 0)

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("every", self.every >= 0, "optimizer steps, must be >= 1, or 0 for each epoch's end")
            check("every", self.every <= self.max_steps, "must not exceed control.max_steps")
            for name in ("max_steps", "digest_every", "validate_every", "stage_ticks"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("attribute_every", self.attribute_every >= 0, "ticks, must be >= 1, or 0 for never")
            for name in ("timeout_s", "slow_timeout_s", "startup_timeout_s"):
                check(name, getattr(self, name) >= 1, "seconds, must be >= 1")


@dataclass(kw_only=True, slots=True)
class WorldConfig:
    """Processes and devices."""

    device: Device = Device.CPU
    """``cpu`` (gloo) or ``gpu`` (``cuda:LOCAL_RANK``; NCCL for data, gloo for control)."""

    nproc_per_node: int = 2
    """Ranks on each machine."""

    nnodes: int = 1
    """Machines."""

    rdzv_endpoint: str | None = None
    """``host:port`` of the rendezvous on the first machine; null: none, which goes with one machine only. ``slurm``:
    inside a Slurm job, whose machines, time limit and restart count are then asked of Slurm.
    """

    rdzv_id: str | None = None
    """Name that the machines of one job share; null: none, which goes with one machine only."""

    max_restarts: int = 0
    """Times that torchrun starts the workers anew after a failure; each time they resume from the newest checkpoint."""

    threads: int = 1
    """Threads of each rank within one operation."""

    find_unused: bool = False
    """DDP looks for parameters without a gradient in every step."""

    grace_s: float = 60.0
    """Seconds that a stopped launcher gives its workers before it ends them."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            for name in ("nproc_per_node", "nnodes", "threads"):
                check(name, getattr(self, name) >= 1, "must be >= 1")
            check("max_restarts", self.max_restarts >= 0, "must be >= 0")
            check("grace_s", self.grace_s > 0, "seconds, must be > 0")
            for name in ("rdzv_endpoint", "rdzv_id") if self.rdzv_endpoint != "slurm" else ():
                check(name, self.nnodes == 1 or getattr(self, name) is not None, "needed when world.nnodes > 1")
