"""One optimizer step of many nets: judged, clipped and applied for each net and owner by itself.

The rules are those of `esper.tolaria.growth`, over rows instead of parameter groups. An owner is a net's host or one of
its slots, the slot's gate included; its gradient is judged by its norm. A host whose gradient is not finite skips its
own net's step; a slot's is left out alone. A row that does not step keeps its bits: results are selected, and nothing
is multiplied by zero.

Shapes: S numbers, R rows, T tensors.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.kasmina.slots.grown import HOST
from esper.simic.batched.recipe import Rules
from esper.simic.batched.weights import COUNTS, Weights

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]
_AT = {name: place for place, name in enumerate(COUNTS)}


class Stepper:
    """Takes steps.

    Args:
        weights: of all nets.
        rules: of the optimizer.
    """

    def __init__(self, weights: Weights, rules: Rules) -> None:
        self.weights, self.rules = weights, rules

    def step(self, grad: Tensor, learning: Bools, lr: Floats, sampled: Bools) -> set[int]:
        """Applies one gradient.

        Args:
            grad: of all numbers, [S].
            learning: rows that have a gradient, [R].
            lr: rate of each row, [R].
            sampled: rows whose gradient health is sampled in this step, [R].

        Returns:
            The nets that skipped the step, since their host's gradient is not finite.
        """
        weights = self.weights
        squares_T = torch.segment_reduce(grad.double().square(), "sum", offsets=weights.tensor_ends, unsafe=True)
        norms_T = squares_T.sqrt().numpy(force=True)
        owners_T = weights.owners[weights.tensor_rows.numpy(force=True)]
        takes_T = learning[weights.tensor_rows.numpy(force=True)]
        rows = len(learning)
        with np.errstate(invalid="ignore", over="ignore"):
            sums = np.bincount(owners_T[takes_T], norms_T[takes_T] ** 2, rows)
            norms_R = np.sqrt(sums).astype(np.float32 if weights.dtype is torch.float32 else np.float64).astype(float)
        present = np.bincount(owners_T[takes_T], minlength=rows) > 0  # owners that have a gradient at all
        broken = present & ~np.isfinite(norms_R)
        hosts = np.array([key[0] == HOST for key in weights.keys], dtype=bool)
        skipping = set(weights.nets[broken & hosts].tolist())
        skipped = np.isin(weights.nets, list(skipping))
        self._count(norms_T, norms_R, present, broken, skipped, sampled, owners_T, takes_T)
        applied = learning & present[weights.owners] & ~broken[weights.owners] & ~skipped
        seeds = present & sampled & ~hosts & ~skipped
        before = weights.flat.clone() if seeds.any() else None
        self._apply(grad, norms_R[weights.owners], applied, lr)
        if before is not None:
            beside = np.isin(weights.nets, weights.nets[seeds]) & hosts & present & ~skipped
            self._count_moved(before, learning, seeds, beside)
        return skipping

    def _count_moved(self, before: Tensor, learning: Bools, seeds: Bools, beside: Bools) -> None:
        """Counts the share of each sampled seed's numbers that the step changed, and the size of the change.

        Args:
            before: all numbers before the step, [S].
            learning: rows that have a gradient, [R].
            seeds: rows of the sampled seeds, [R].
            beside: rows of the hosts of nets with a sampled seed, whose change is counted too, [R].
        """
        weights, rows, both = self.weights, len(learning), seeds | beside
        number_rows = weights.number_rows.numpy(force=True)
        change = (weights.flat - before).double().numpy(force=True)
        changed_R = np.bincount(number_rows[(weights.flat != before).numpy(force=True)], minlength=rows)
        squares_R = np.bincount(number_rows, change**2, rows)
        takes = learning & both[weights.owners]
        changed, squares, sizes = (
            np.bincount(weights.owners[takes], values[takes], rows)
            for values in (changed_R, squares_R, np.bincount(number_rows, minlength=rows))
        )
        weights.counts[seeds, _AT["moved"]] += changed[seeds] / np.maximum(sizes[seeds], 1)
        weights.counts[seeds, _AT["moved_steps"]] += 1
        weights.counts[both, _AT["update_rms"]] += np.sqrt(squares[both] / np.maximum(sizes[both], 1))
        weights.counts[both, _AT["update_steps"]] += 1

    def _count(
        self,
        norms_T: Floats,
        norms_R: Floats,
        present: Bools,
        broken: Bools,
        skipped: Bools,
        sampled: Bools,
        owners_T: npt.NDArray[np.int64],
        takes_T: Bools,
    ) -> None:
        weights, counts, rules, rows = self.weights, self.weights.counts, self.rules, len(present)
        fine = present & ~broken
        counts[fine, _AT["norm"]] += norms_R[fine]
        counts[fine, _AT["norm_steps"]] += 1
        counts[broken & ~skipped, _AT["nonfinite"]] += 1  # a broken host breaks the seeds too: no slot's fault
        if broken.any():
            of_broken = takes_T & broken[owners_T]
            counts[:, _AT["nans"]] += np.bincount(owners_T[of_broken & np.isnan(norms_T)], minlength=rows)
            counts[:, _AT["infs"]] += np.bincount(owners_T[of_broken & np.isinf(norms_T)], minlength=rows)
        if not sampled.any():
            return
        sizes = weights.tensor_sizes.numpy(force=True)
        chosen = takes_T & sampled[owners_T]
        totals = np.maximum(np.bincount(owners_T[chosen], sizes[chosen], rows), 1)
        rms = norms_T / np.sqrt(np.maximum(sizes, 1))
        for name, hit in (
            ("vanishing", rms < rules.vanishing_rms),
            ("exploding", (rms > rules.exploding_rms) & np.isfinite(rms)),
        ):
            counts[:, _AT[name]] += np.bincount(owners_T[chosen & hit], sizes[chosen & hit], rows) / totals
        counts[present & sampled, _AT["health_steps"]] += 1
        numbers = np.bincount(owners_T[chosen], sizes[chosen], rows)
        counts[present & sampled, _AT["numbers"]] += numbers[present & sampled]

    def _apply(self, grad: Tensor, norms: Floats, applied: Bools, lr: Floats) -> None:
        """Updates the rows that are applied.

        Args:
            grad: [S].
            norms: norm of each row's owner, [R].
            applied: [R].
            lr: [R].
        """
        weights, rules = self.weights, self.rules
        if rules.clip_norm is not None:
            with np.errstate(invalid="ignore"):
                clip = np.minimum(rules.clip_norm / (norms + 1e-6), 1.0)
            if (clip[applied] < 1.0).any():
                grad = grad * self._spread(clip)
        before = None if applied.all() else (weights.flat.clone(), weights.first.clone(), weights.second.clone())
        weights.steps[applied] += 1
        (self._adamw if rules.adamw else self._sgd)(grad, lr)
        if before is not None:
            takes = self._spread(applied)
            for after, old in zip((weights.flat, weights.first, weights.second), before, strict=True):
                after.copy_(torch.where(takes, after, old))

    def _spread(self, rows: npt.NDArray[np.generic]) -> Tensor:
        """A value for each number from one for each row."""
        values = torch.from_numpy(np.ascontiguousarray(rows)).to(self.weights.device)
        return (values if values.dtype is torch.bool else values.to(self.weights.dtype))[self.weights.number_rows]

    def _decay(self) -> Floats | None:
        """Weight decay of each row's matrices; None where there is none."""
        host, seed = self.rules.weight_decay, self.rules.seed_weight_decay
        return np.array([host if key[0] == HOST else seed for key in self.weights.keys]) if host or seed else None

    def _adamw(self, grad: Tensor, lr: Floats) -> None:
        weights, (beta1, beta2), decay = self.weights, self.rules.betas, self._decay()
        steps = np.maximum(weights.steps, 1)
        if decay is not None:
            weights.flat.mul_(torch.where(weights.matrices, self._spread(1.0 - lr * decay), 1.0))
        weights.first.lerp_(grad, 1.0 - beta1)
        weights.second.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
        root = self._spread(np.sqrt(1.0 - beta2**steps))
        size = self._spread(-lr / (1.0 - beta1**steps))
        weights.flat.addcdiv_(weights.first * size, (weights.second.sqrt() / root).add_(self.rules.eps))

    def _sgd(self, grad: Tensor, lr: Floats) -> None:
        weights, decay = self.weights, self._decay()
        if decay is not None:
            pull = self._spread(decay)
            grad = torch.where(weights.matrices, grad + pull * weights.flat, grad)
        if self.rules.momentum:
            grad = weights.first.mul_(self.rules.momentum).add_(grad)
        weights.flat.add_(self._spread(-lr) * grad)


def rate_of_seed(rules: Rules, host: float, step: int, learn_step: int | None) -> float:
    """Learning rate of a seed; see `esper.tolaria.growth.ownership`.

    Args:
        rules: of the optimizer.
        host: rate of its host at this step.
        step: optimizer step.
        learn_step: first step in which it learns; None while it does not.
    """
    since = 0 if learn_step is None else step - learn_step
    warm = min(1.0, (since + 1) / rules.seed_warmup_steps) if rules.seed_warmup_steps else 1.0
    return host * rules.seed_lr_scale * warm
