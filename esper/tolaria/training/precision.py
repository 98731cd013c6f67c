"""Number formats of a run, and the loss scale of fp16.

float16 has no numbers below 6e-8, so small gradients would be lost: the loss is multiplied by a scale before its
backward, and the gradients are divided by it again (Micikevicius et al. 2018, "Mixed Precision Training", section 3.2).
The scale moves as that of `torch.amp.GradScaler`, judged per owner (`guard.move_scale` of growth/). Every rank
judges the same reduced gradients, so all skip the same steps and have one scale without a collective. It lies in every
checkpoint and snapshot, as the state of an observer.
"""

import contextlib
from typing import Any

import torch

from esper.leyline.errors import CheckpointError
from esper.tolaria.growth.guard import Judgement, StepReport, move_scale
from esper.tolaria.growth.ownership import ParameterOwner
from esper.tolaria.lockstep.observers import Observer
from esper.tolaria.training.config import Precision

HALF = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}


def dtype_of(precision: Precision) -> torch.dtype:
    """Number format of the parameters."""
    return torch.float64 if precision is Precision.FP64 else torch.float32


def autocast(precision: Precision, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Autocast to the half precision that was asked for; otherwise a context that does nothing."""
    if precision in HALF:
        return torch.autocast(device.type, dtype=HALF[precision])
    return contextlib.nullcontext()


class Unscaled:
    """Steps on the gradients as they are: for every format but fp16.

    Fields:
        value: factor of the loss in backward.
        observers: what a checkpoint holds of it.
    """

    value: float = 1.0
    observers: tuple[Observer, ...] = ()

    def __init__(self, owner: ParameterOwner) -> None:
        self.owner = owner

    def step(self) -> StepReport | Judgement:
        """One optimizer step; see `ParameterOwner.step`."""
        return self.owner.step()


class LossScale(Unscaled, Observer):
    """The scale of a run in fp16, with torch's own numbers: 65,536 at first, halved by an overflow, doubled after
    2,000 steps without one.

    Fields:
        overflows: by slot, steps in a row whose gradient overflowed there alone.
    """

    name = "loss scale"

    def __init__(self, owner: ParameterOwner) -> None:
        super().__init__(owner)
        self.scaler: dict[str, Any] = torch.amp.GradScaler("cpu").state_dict()  # on the CPU, where it decides
        self.overflows: dict[str, int] = {}
        self.observers = (self,)

    @property
    def value(self) -> float:  # type: ignore[override]
        """Factor of the loss in backward."""
        return float(self.scaler["scale"])

    def step(self) -> StepReport:
        """One optimizer step on the gradients divided by the scale, which moves then."""
        factor = 1.0 / self.value
        torch._foreach_mul_([p.grad for g in self.owner.all_groups for p in g["params"] if p.grad is not None], factor)
        self.scaler, self.overflows, report = move_scale(self.scaler, self.overflows, self.owner.step_now())
        return report

    def state_dict(self) -> dict[str, Any]:
        """See `Observer.state_dict`."""
        return {"scaler": dict(self.scaler), "overflows": dict(self.overflows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Observer.load_state_dict`.

        Raises:
            CheckpointError: a number of the scaler is missing or unknown.
        """
        if set(state.get("scaler", ())) != set(self.scaler) or "overflows" not in state:
            raise CheckpointError(f"loss scale: {', '.join(sorted(self.scaler))} and overflows are what it has")
        self.scaler, self.overflows = dict(state["scaler"]), dict(state["overflows"])
