"""Health of gradients: how much of an owner's gradient vanishes, explodes or is not finite, and whether seeds move.
Reported, never a fault.

    RMS of a tensor          sqrt(mean g^2) = ||g|| / sqrt(numel): independent of the tensor's size
    vanishing, exploding     share of the owner's parameters in tensors whose RMS is below or above a threshold; it is
                             weighted by parameters, so that one bias does not speak for a network
    NaN, Inf                 tensors whose gradient has a NaN, or else an Inf (or a norm beyond float32), counted apart;
                             with a fused optimizer, which nobody waits for, steps in which some have
    moved                    share of a seed's numbers that an optimizer step changed as stored: a half-precision
                             weight stands still where its update is below half its last digit, however healthy the
                             gradient
    update                   sqrt(mean (after - before)^2) over an owner's parameters that have a gradient. A newborn's
                             over the host's (parity) says whether it learns at the host's pace; the same of gradients
                             is made of their norms and of how many numbers have one. The host's update is measured
                             only while a seed learns

Nothing here waits for a device, except `take`. Every ``every``-th step since the last reading (always the first) adds
its shares on the device; a step that may not be finite adds its counts; `take` reads all of it, once a tick.

Shapes: T tensors, O owners.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.slots.grown import HOST

MOST_SETS = 8  # sets of gradients whose constants are kept: sites that may be left out make several
MOST_COPIED = 2**24  # numbers of the host that are copied for the size of its update: 64 MiB for one step a tick
SMALL = 16_384  # elements; smaller tensors are copied into one, which costs less than a launch for each


def copy_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors, without a gradient, by one operation over all of them."""
    with torch.no_grad():
        return list(torch._foreach_mul(list(tensors), 1.0))


def sample_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors, or where they hold more than `MOST_COPIED` numbers, an equal share of the first rows of each."""
    size = sum(tensor.numel() for tensor in tensors)
    if size <= MOST_COPIED:
        return list(tensors)
    share = MOST_COPIED / size
    return [t.detach()[: max(1, int(share * len(t)))] if t.ndim else t.detach() for t in tensors]


def norms_one_by_one(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each tensor, float64 [T]; one kernel per tensor."""
    return torch.stack([torch.linalg.vector_norm(tensor).double() for tensor in tensors])


def norms_batched(tensors: Sequence[Tensor]) -> Tensor:
    """The same norms up to rounding; small tensors share one segmented reduction."""
    small = [index for index, tensor in enumerate(tensors) if tensor.numel() <= SMALL]
    if len(small) < 2 or len({tensor.device for tensor in tensors}) > 1:
        return norms_one_by_one(tensors)
    flat = torch.cat([tensors[index].reshape(-1) for index in small]).double()
    ends = _on(tensors[0].device, [0, *_running_totals([tensors[index].numel() for index in small])])
    # unsafe: the offsets are right by construction, and checking them would wait for the device.
    norms = torch.segment_reduce(flat * flat, "sum", offsets=ends, unsafe=True).sqrt()
    large = [index for index in range(len(tensors)) if tensors[index].numel() > SMALL]
    if not large:
        return norms
    both = torch.cat([norms, norms_one_by_one([tensors[index] for index in large])])
    order = [*small, *large]
    return both[_on(both.device, sorted(range(len(order)), key=order.__getitem__))]


def _running_totals(counts: Sequence[int]) -> list[int]:
    total, totals = 0, []
    for count in counts:
        total += count
        totals.append(total)
    return totals


def _on(device: torch.device, values: Sequence[Any], dtype: torch.dtype = torch.int64) -> Tensor:
    """A constant on the device; it is pinned on its way to a GPU, so that the copy does not wait."""
    constant = torch.tensor(values, dtype=dtype)
    return constant.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else constant.to(device)


@dataclass(slots=True)
class OwnerHealth:
    """Sums of one owner over the steps since the last reading.

    Fields:
        vanishing: sum of the vanishing shares, each in [0, 1], over ``health_steps`` sampled steps.
        exploding: the same of the exploding shares.
        health_steps: sampled steps.
        nans: gradient tensors with a NaN, in all steps; with a fused optimizer, steps with such a tensor.
        infs: the same of an Inf, where there is no NaN.
        moved: sum of the shares of its numbers that a step changed, over ``moved_steps`` sampled steps; seeds only.
        moved_steps: sampled steps that were taken.
        numbers: sum over ``health_steps`` of how many of its parameters had a gradient.
        update_rms: sum of the update's RMS over ``update_steps``.
        update_steps: sampled steps that were taken, in which the update was measured.
    """

    vanishing: float = 0.0
    exploding: float = 0.0
    health_steps: int = 0
    nans: int = 0
    infs: int = 0
    moved: float = 0.0
    moved_steps: int = 0
    numbers: int = 0
    update_rms: float = 0.0
    update_steps: int = 0


class GradientMeter:
    """Measures gradients step by step and hands out sums once a tick.

    Args:
        vanishing_rms: RMS below which a tensor vanishes.
        exploding_rms: RMS above which a tensor explodes.
        every: steps between samples.
    """

    def __init__(self, *, vanishing_rms: float, exploding_rms: float, every: int) -> None:
        self.vanishing_rms, self.exploding_rms, self.every = vanishing_rms, exploding_rms, every
        self._constants: dict[tuple[tuple[str, tuple[int, ...]], ...], tuple[Tensor, Tensor]] = {}
        self._reset()

    def _reset(self) -> None:
        self._seen = 0
        self._shares: dict[tuple[str, ...], list[Tensor]] = {}  # per set of owners: one [O, 2] a sampled step
        self._broken: dict[tuple[tuple[str, int], ...], Tensor] = {}  # per owners and tensors: NaN, Inf, [2, T]
        self._before: dict[str, tuple[list[Tensor], list[Tensor]]] = {}  # parameters, and copies from before the step
        self._moved: dict[str, list[Tensor]] = {}  # per seed: a share, 0-D, a sampled step
        self._updates: dict[str, list[Tensor]] = {}  # per owner: an RMS, 0-D, a sampled step
        self._numbers: dict[str, int] = {}  # per owner: how many had a gradient, summed over sampled steps

    def step(
        self,
        gradients: Mapping[str, Sequence[Tensor]],
        norms: Mapping[str, Tensor],
        groups: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        """Measures the reduced gradients of one optimizer step, before clipping.

        Args:
            gradients: the tensors of each owner that has some.
            norms: for every owner whose gradient may not be finite, L2 norms of its tensors [T], or of them all [1].
            groups: optimizer groups of each owner; `count_moved` is to say which seeds move.
        """
        self._before = {}
        if self._seen % self.every == 0 and gradients:
            for owner, own in (groups or {}).items():
                learning = [p for group in own for p in group["params"] if p.grad is not None]
                if owner != HOST and learning:
                    self._before[owner] = learning, copy_all(learning)
            if self._before:  # a newborn's update is read beside the incumbent's
                host = [p for group in (groups or {}).get(HOST, ()) for p in group["params"] if p.grad is not None]
                if host:
                    sample = sample_rows(host)
                    self._before[HOST] = sample, copy_all(sample)
            owners = tuple(gradients)
            for owner, mine in gradients.items():
                self._numbers[owner] = self._numbers.get(owner, 0) + sum([gradient.numel() for gradient in mine])
            self._shares.setdefault(owners, []).append(self._share(gradients))
        if norms:
            norms_T = torch.cat(list(norms.values()))
            counts = torch.stack([norms_T.isnan(), norms_T.isinf()]).long()
            key = tuple((owner, len(own)) for owner, own in norms.items())
            self._broken[key] = self._broken[key] + counts if key in self._broken else counts
        self._seen += 1

    def count_moved(self) -> None:
        """Compares parameters with what they were before the step; called after it, if it was taken."""
        for owner, (after, before) in self._before.items():
            size = max(1, sum(parameter.numel() for parameter in after))
            if owner != HOST:
                changed = [(parameter.detach() != old).sum() for parameter, old in zip(after, before, strict=True)]
                self._moved.setdefault(owner, []).append(torch.stack(changed).sum().double() / size)
            with torch.no_grad():
                norm = torch.nn.utils.get_total_norm(torch._foreach_sub(after, before)).double()
            self._updates.setdefault(owner, []).append(norm / math.sqrt(size))
        self._before = {}

    def _share(self, gradients: Mapping[str, Sequence[Tensor]]) -> Tensor:
        """Share of each owner's parameters in tensors that vanish, and in tensors that explode; [O, 2]."""
        tensors = [tensor for own in gradients.values() for tensor in own]
        roots, weights_OT = self._constant(gradients, tensors[0].device)
        rms = norms_batched(tensors) / roots
        explodes = (rms > self.exploding_rms) & rms.isfinite()
        return weights_OT @ torch.stack([rms < self.vanishing_rms, explodes], 1).double()

    def _constant(self, gradients: Mapping[str, Sequence[Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Roots of the sizes [T], and each tensor's share of its owner's parameters [O, T]."""
        key = tuple((owner, tuple(tensor.numel() for tensor in own)) for owner, own in gradients.items())
        if key not in self._constants:
            if len(self._constants) >= MOST_SETS:
                self._constants.clear()
            sizes = [(owner, size) for owner, own in key for size in own]
            totals = {owner: sum(own) for owner, own in key}
            rows = [[size / max(1, totals[of]) if of == owner else 0.0 for of, size in sizes] for owner in totals]
            roots = [math.sqrt(max(1, size)) for _, size in sizes]
            self._constants[key] = _on(device, roots, torch.float64), _on(device, rows, torch.float64)
        return self._constants[key]

    def take(self) -> dict[str, OwnerHealth]:
        """Returns the sums since the last call and begins anew; waits for the device once per set of owners."""
        groups = [*self._shares, *(tuple(owner for owner, _ in key) for key in self._broken), tuple(self._updates)]
        health = {owner: OwnerHealth() for owners in groups for owner in owners}
        for owners, shares in self._shares.items():
            for owner, (vanishing, exploding) in zip(owners, torch.stack(shares).sum(0).tolist(), strict=True):
                health[owner].vanishing += vanishing
                health[owner].exploding += exploding
                health[owner].health_steps += len(shares)
        for key, counts in self._broken.items():
            columns = iter(zip(*counts.tolist(), strict=True))
            for owner, size in key:
                for nan, inf in islice(columns, size):
                    health[owner].nans += nan
                    health[owner].infs += inf
        for owner, numbers in self._numbers.items():
            health[owner].numbers = numbers
        if self._updates:
            series = [*self._moved.values(), *self._updates.values()]
            totals = iter(torch.stack([torch.stack(one).sum() for one in series]).tolist())
            for owner, moved in self._moved.items():
                health[owner].moved, health[owner].moved_steps = next(totals), len(moved)
            for owner, updates in self._updates.items():
                health[owner].update_rms, health[owner].update_steps = next(totals), len(updates)
        self._reset()
        return health

    def state(self) -> dict[str, Any]:
        """The measurements since the last reading: numbers, text, and tensors on the CPU."""
        return {
            "seen": self._seen,
            "shares": [[list(owners), torch.stack(shares).cpu()] for owners, shares in self._shares.items()],
            "broken": [[[list(pair) for pair in key], counts.cpu()] for key, counts in self._broken.items()],
            "moved": [[owner, torch.stack(moved).cpu()] for owner, moved in self._moved.items()],
            "numbers": dict(self._numbers),
            "updates": [[owner, torch.stack(updates).cpu()] for owner, updates in self._updates.items()],
        }

    def load(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restores `state`.

        Args:
            state: from `state`.
            device: device of the gradients to come.
        """
        self._seen = state["seen"]
        self._shares = {tuple(owners): list(shares.to(device).unbind()) for owners, shares in state["shares"]}
        self._broken = {
            tuple((owner, size) for owner, size in key): counts.to(device) for key, counts in state["broken"]
        }
        self._moved = {owner: list(moved.to(device).unbind()) for owner, moved in state["moved"]}
        self._numbers = dict(state["numbers"])
        self._updates = {owner: list(updates.to(device).unbind()) for owner, updates in state["updates"]}
