"""Health of gradients: how much of an owner's gradient vanishes, explodes, or is not a number. Reported, never a fault.

    RMS of a tensor          sqrt(mean g^2) = ||g|| / sqrt(numel): independent of the tensor's size
    vanishing, exploding     share of the owner's parameters that stand in tensors whose RMS is below or above a
                             threshold: weighted by parameters, so that one bias does not speak for a network
    NaN, Inf                 tensors whose gradient has a NaN, or else an Inf (or a norm beyond float32), counted apart

Nothing here waits for a device. Every ``every``-th step since the last reading (the first always) adds its shares, on
the device; a step that may not be finite adds its counts; `take` reads it all, once a tick. T tensors, O owners.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

SMALL = 16_384  # elements up to which a tensor is copied into one with its like: the copy costs less than a launch


def norms_one_by_one(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each tensor, float64 [T]; one kernel a tensor."""
    return torch.stack([torch.linalg.vector_norm(tensor).double() for tensor in tensors])


def norms_batched(tensors: Sequence[Tensor]) -> Tensor:
    """The same numbers, to rounding; small tensors in one reduction by segments."""
    small = [index for index, tensor in enumerate(tensors) if tensor.numel() <= SMALL]
    if len(small) < 2 or len({tensor.device for tensor in tensors}) > 1:
        return norms_one_by_one(tensors)
    flat = torch.cat([tensors[index].reshape(-1) for index in small]).double()
    ends = _on(tensors[0].device, [0, *_running([tensors[index].numel() for index in small])])
    # unsafe: the offsets are right by construction, and checking them would wait for the device.
    found = torch.segment_reduce(flat * flat, "sum", offsets=ends, unsafe=True).sqrt()
    large = [index for index in range(len(tensors)) if tensors[index].numel() > SMALL]
    if not large:
        return found
    both = torch.cat([found, norms_one_by_one([tensors[index] for index in large])])
    order = [*small, *large]
    return both[_on(both.device, sorted(range(len(order)), key=order.__getitem__))]


def _running(counts: Sequence[int]) -> list[int]:
    total, found = 0, []
    for count in counts:
        total += count
        found.append(total)
    return found


def _on(device: torch.device, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """A constant on the device; pinned on the way to a GPU, so that the copy waits for nothing."""
    constant = torch.tensor(values, dtype=dtype)
    return constant.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else constant.to(device)


@dataclass(slots=True)
class OwnerHealth:
    """Sums of one owner over the steps since the last reading.

    Fields:
        vanishing, exploding: sums of the shares, each in [0, 1], over ``health_steps`` sampled steps.
        nans, infs: tensors of gradients in all steps.
    """

    vanishing: float = 0.0
    exploding: float = 0.0
    health_steps: int = 0
    nans: int = 0
    infs: int = 0


class GradientMeter:
    """Takes gradients step by step and hands out sums once a tick.

    Args:
        vanishing_rms, exploding_rms: thresholds of a tensor's RMS. every: steps between samples.
    """

    def __init__(self, *, vanishing_rms: float, exploding_rms: float, every: int) -> None:
        self.vanishing_rms, self.exploding_rms, self.every = vanishing_rms, exploding_rms, every
        self._constants: dict[tuple[tuple[str, tuple[int, ...]], ...], tuple[Tensor, Tensor]] = {}
        self._reset()

    def _reset(self) -> None:
        self._seen = 0
        self._shares: dict[tuple[str, ...], list[Tensor]] = {}  # per set of owners: one [O, 2] a sampled step
        self._broken: dict[tuple[tuple[str, int], ...], Tensor] = {}  # per owners and tensors: NaN, Inf, [2, T]

    def step(self, gradients: Mapping[str, Sequence[Tensor]], norms: Mapping[str, Tensor]) -> None:
        """Takes the reduced gradients of one optimizer step, before clipping.

        Args:
            gradients: per owner, its tensors; an owner without any is not named.
            norms: L2 norms of these tensors, [T] per owner, for every owner whose gradient may not be finite.
        """
        if self._seen % self.every == 0 and gradients:
            owners = tuple(gradients)
            self._shares.setdefault(owners, []).append(self._share(gradients))
        if norms:
            every = torch.cat(list(norms.values()))
            counts = torch.stack([every.isnan(), every.isinf()]).long()
            key = tuple((owner, len(found)) for owner, found in norms.items())
            self._broken[key] = self._broken[key] + counts if key in self._broken else counts
        self._seen += 1

    def _share(self, gradients: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """[O, 2]: share of each owner's parameters in tensors that vanish, that explode."""
        tensors = [tensor for found in gradients.values() for tensor in found]
        roots, weights_OT = self._constant(gradients, tensors[0].device)
        rms = norms_batched(tensors) / roots
        explodes = (rms > self.exploding_rms) & rms.isfinite()
        return weights_OT @ torch.stack([rms < self.vanishing_rms, explodes], 1).double()

    def _constant(self, gradients: Mapping[str, Sequence[Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Roots of the sizes [T], and each tensor's share of its owner's parameters [O, T]."""
        key = tuple((owner, tuple(tensor.numel() for tensor in found)) for owner, found in gradients.items())
        if key not in self._constants:
            self._constants.clear()  # the set of gradients changed; it does not change back and forth
            sizes = [(owner, size) for owner, found in key for size in found]
            totals = {owner: sum(found) for owner, found in key}
            rows = [[size / max(1, totals[own]) if own == owner else 0.0 for own, size in sizes] for owner in totals]
            roots = [math.sqrt(max(1, size)) for _, size in sizes]
            self._constants[key] = _on(device, roots, torch.float64), _on(device, rows, torch.float64)
        return self._constants[key]

    def take(self) -> dict[str, OwnerHealth]:
        """Sums since the last call, and begins anew; waits for the device once for each set of owners and fault."""
        seen = [*self._shares, *(tuple(owner for owner, _ in key) for key in self._broken)]
        found = {owner: OwnerHealth() for owners in seen for owner in owners}
        for owners, shares in self._shares.items():
            for owner, (vanishing, exploding) in zip(owners, torch.stack(shares).sum(0).tolist(), strict=True):
                found[owner].vanishing += vanishing
                found[owner].exploding += exploding
                found[owner].health_steps += len(shares)
        for key, counts in self._broken.items():
            every = iter(zip(*counts.tolist(), strict=True))
            for owner, size in key:
                for nan, inf in islice(every, size):
                    found[owner].nans += nan
                    found[owner].infs += inf
        self._reset()
        return found

    def state(self) -> dict[str, Any]:
        """What was taken since the last reading: numbers, text, and tensors on the CPU."""
        return {
            "seen": self._seen,
            "shares": [[list(owners), torch.stack(shares).cpu()] for owners, shares in self._shares.items()],
            "broken": [[[list(pair) for pair in key], counts.cpu()] for key, counts in self._broken.items()],
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Takes `state` back; ``device``: where the gradients to come are."""
        self._seen = state["seen"]
        self._shares = {tuple(owners): list(shares.to(device).unbind()) for owners, shares in state["shares"]}
        self._broken = {
            tuple((owner, size) for owner, size in key): counts.to(device) for key, counts in state["broken"]
        }
