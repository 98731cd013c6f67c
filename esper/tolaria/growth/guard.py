"""Judges the gradients of one optimizer step: an L2 norm per owner, and which of them are not finite.

A non-finite host gradient skips the step; one confined to a slot is left out. There are two ways to judge:

    at once   the CPU reads the norms before the optimizer steps: one wait for the device in every step
    late      a fused optimizer reads ``found_inf`` on the device, one flag per owner, and leaves parameters, moments
              and step counts alone where it is 1 (as torch.amp.GradScaler makes it do); the result is read one step
              later, when the device has long passed it, so no step waits

Every rank reads the same numbers after the same step, since gradients are equal after their reduction. So all ranks see
a row of skipped steps at the same time, late by one step.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.slots.grown import HOST

PATIENCE = 4  # steps in a row for which an overflow in one slot is blamed on the loss scale


@dataclass(frozen=True, slots=True)
class StepReport:
    """The result of one optimizer step."""

    norms: dict[str, float]
    """L2 norm of each owner's gradient, before clipping."""
    broken: tuple[str, ...]
    """Owners whose gradient was not finite."""
    skipped: bool
    """Whether the step was skipped: the host's gradient was not finite."""
    overflowed: bool = False
    """Whether it was skipped while the loss scale could still be lowered, which was done: no fault of the run yet."""


class Judgement:
    """Norms on their way from the device.

    Args:
        owners: names of the owners.
        norms_O: L2 norm of each owner's gradient, on the device.
    """

    def __init__(self, owners: Sequence[str], norms_O: Tensor) -> None:
        self._owners, self._event, self._there_O = tuple(owners), None, norms_O
        if norms_O.device.type == "cuda":
            self._norms_O = torch.empty(norms_O.shape, dtype=norms_O.dtype, pin_memory=True)
            self._norms_O.copy_(norms_O, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._norms_O = norms_O.clone()

    def wait(self) -> None:
        """Waits until the device has passed that step."""
        if self._event is not None:
            self._event.synchronize()

    def taken(self) -> Tensor:
        """1 if the optimizer took that step, 0 if it skipped it; 0-D float32 on the device, without a wait for it."""
        found_inf = build_found_inf(self._owners, self._there_O)
        return 1.0 - found_inf[HOST] if HOST in found_inf else self._there_O.new_ones((), dtype=torch.float32)

    def read(self) -> StepReport:
        """The report of that step; waits for the device."""
        self.wait()
        return read_report(self._owners, self._norms_O)


def read_report(owners: Sequence[str], norms_O: Tensor) -> StepReport:
    """The report of one step from its norms; waits for the device if they lie there."""
    norms = dict(zip(owners, norms_O.tolist(), strict=True))
    broken = tuple(owner for owner, norm in norms.items() if not math.isfinite(norm))
    return StepReport({owner: norm for owner, norm in norms.items() if owner not in broken}, broken, HOST in broken)


def stack_norms(totals: Mapping[str, Tensor]) -> Tensor:
    """Norms of all owners, float64 [O]."""
    return torch.stack([total.double() for total in totals.values()])


def leave_idle(
    report: StepReport,
    may_skip: Collection[str],
    grads: dict[str, Any],
    totals: dict[str, Tensor],
    groups: Mapping[str, Sequence[Mapping[str, Any]]],
) -> StepReport:
    """Takes seeds out of a step in which their site ran on no rank: no decay, no momentum, no measurement.

    Args:
        report: of the step.
        may_skip: owners whose site may be left out; a gradient of zeros says that it was, on every rank.
        grads: by owner; those owners are taken out, as of ``totals``.
        totals: norms by owner.
        groups: optimizer groups by owner; their parameters lose the gradient.

    Returns:
        The report without them.
    """
    idle = [owner for owner, norm in report.norms.items() if owner in may_skip and norm == 0.0]
    for owner in idle:
        del grads[owner], totals[owner]
        for group in groups[owner]:
            for parameter in group["params"]:
                parameter.grad = None
    return replace(report, norms={owner: norm for owner, norm in report.norms.items() if owner not in idle})


def move_scale(
    scaler: Mapping[str, Any], overflows: Mapping[str, int], report: StepReport
) -> tuple[dict[str, Any], dict[str, int], StepReport]:
    """What a step has to say about the loss scale.

    A non-finite host gradient lowers it, as in torch. One confined to a slot, which was dropped, lowers it for a few
    steps in a row; if that does not cure it, the seed itself is broken: it is reported, and the scale is left alone.

    Args:
        scaler: state of a `torch.amp.GradScaler` before the step.
        overflows: by slot, steps in a row with a non-finite gradient there alone.
        report: of the step.

    Returns:
        Both after the step, and the report with those owners as broken that the scale is not blamed for.
    """
    slots = [owner for owner in report.broken if owner != HOST]
    overflows = {} if report.skipped else {slot: overflows.get(slot, 0) + 1 for slot in slots}
    at_fault = tuple(slot for slot in overflows if overflows[slot] > PATIENCE)
    state = dict(scaler)
    if report.skipped or set(overflows) - set(at_fault):
        state |= {"scale": state["scale"] * state["backoff_factor"], "_growth_tracker": 0}
    else:
        state["_growth_tracker"] += 1
        if state["_growth_tracker"] >= state["growth_interval"]:
            state |= {"scale": state["scale"] * state["growth_factor"], "_growth_tracker": 0}
    broken = (HOST, *slots) if report.skipped else at_fault
    return state, overflows, replace(report, broken=broken, overflowed=report.skipped and scaler["scale"] > 1.0)


def build_found_inf(owners: Sequence[str], norms_O: Tensor) -> dict[str, Tensor]:
    """``found_inf`` of each owner, 0-D float32 on the device: 1 where its parameters must be left alone."""
    broken_O = ~norms_O.isfinite()
    if HOST in owners:
        broken_O = broken_O | broken_O[owners.index(HOST)]
    return dict(zip(owners, broken_O.float().unbind(), strict=True))
