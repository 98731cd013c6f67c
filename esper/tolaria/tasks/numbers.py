"""Regression: numbers of each sample, by squared, absolute or Huber's error.

The loss of a sample is the mean over its outputs; its unit is that of the target, squared for MSE and Huber's. Huber's
loss is d^2 / 2 within ``delta`` and delta (|d| - delta / 2) beyond (Huber 1964, "Robust estimation of a location
parameter"), as torch has it.

Shapes: B samples, D numbers of each.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.leyline.errors import ConfigError
from esper.leyline.events.task import MetricInfo
from esper.tolaria.data.parts import Bundle
from esper.tolaria.tasks.configs import Error, RegressionConfig
from esper.tolaria.tasks.counts import mean_of
from esper.tolaria.tasks.targets import targets_in
from esper.tolaria.tasks.task import Metric, Scores, Sums, Task, read_logits

MOST = 64  # numbers of a sample for which R2 is counted


class RegressionTask(Task):
    """Regression.

    Args:
        config: the loss.
        outputs: D.
    """

    name = "regression"

    def __init__(self, config: RegressionConfig, outputs: int) -> None:
        self.config, self.outputs = config, outputs
        unit = config.unit
        square = f"{unit}^2" if unit else ""
        self.unit = unit if config.loss is Error.L1 else square
        counted = range(outputs if outputs <= MOST else 0)
        self.columns = ["absolute", "squared", *(f"{of}{k}" for of in ("squared", "y", "yy") for k in counted)]
        self.metrics = [
            Metric(MetricInfo(name="mae", unit=unit, higher=False), mean_of("absolute")),
            Metric(MetricInfo(name="rmse", unit=unit, higher=False), _rmse),
            *([Metric(MetricInfo(name="r2"), _r2(outputs))] if counted else []),
        ]

    def _difference(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        """Output minus target, and target, [B, D] each, in at least float32."""
        found = read_logits(output, self.name)
        if found.ndim == target.ndim + 1 and found.shape[-1] == 1:
            found = found[..., 0]
        elif target.ndim == found.ndim + 1 and target.shape[-1] == 1:
            target = target[..., 0]
        if found.shape != target.shape:
            raise ValueError(f"got output {list(found.shape)} and target {list(target.shape)}, expected one shape")
        found = found.to(torch.promote_types(found.dtype, torch.float32)).reshape(len(found), -1)
        wanted = target.to(found.dtype).reshape(found.shape)
        if found.shape[1] != self.outputs:
            raise ValueError(f"got {found.shape[1]} numbers of each sample, the data says {self.outputs}")
        return found - wanted, wanted

    def score(self, output: Any, target: Any) -> Scores:
        """The error of each sample, mean over its numbers."""
        difference, wanted = self._difference(output, target)
        if self.config.loss is Error.MSE:
            loss = difference.square().mean(1)
        elif self.config.loss is Error.L1:
            loss = difference.abs().mean(1)
        else:
            zero = torch.zeros_like(difference)
            loss = F.huber_loss(difference, zero, reduction="none", delta=self.config.delta).mean(1)
        d, y = difference.detach().double(), wanted.double()
        sums = {"absolute": d.abs().mean(1), "squared": d.square().mean(1)}
        if self.outputs <= MOST:
            for k in range(self.outputs):
                sums |= {f"squared{k}": d[:, k].square(), f"y{k}": y[:, k], f"yy{k}": y[:, k].square()}
        return Scores(loss, None, sums)

    def chance(self, targets: Iterable[Any]) -> float:
        """Loss of the constant that is best for squared errors, or for absolute ones."""
        rows = torch.cat([tensor.double().reshape(len(tensor), -1) for tensor in targets_in(targets)])
        middle = rows.mean(0) if self.config.loss is Error.MSE else rows.median(0).values
        return float(self.score(middle.expand_as(rows), rows).loss.mean())


def _rmse(sums: Sums) -> float | None:
    return math.sqrt(sums["squared"] / sums["count"]) if sums["count"] else None


def _r2(outputs: int) -> Callable[[Sums], float | None]:
    """The mean over outputs of 1 - squared error / variance, as scikit-learn has it; None for a constant target."""

    def value(sums: Sums) -> float | None:
        found = []
        for k in range(outputs):
            spread = sums[f"yy{k}"] - sums[f"y{k}"] ** 2 / sums["count"] if sums["count"] else 0.0
            if spread <= 0:
                return None
            found.append(1 - sums[f"squared{k}"] / spread)
        return sum(found) / len(found)

    return value


def build_regression(config: RegressionConfig, bundle: Bundle) -> Task:
    """Regression of as many numbers as a target has.

    Raises:
        ConfigError: targets are no numbers.
    """
    _, y = bundle.train.fetch(torch.arange(2))
    if not isinstance(y, Tensor):
        raise ConfigError(f"task.kind = 'regression': a target is {type(y).__name__}, need a tensor of numbers")
    return RegressionTask(config, y[0].numel())
