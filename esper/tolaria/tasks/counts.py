"""What metrics of classes are made of: counts of each class and sample, which add up over samples.

Shapes: B samples, K classes, P positions of a sample.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.leyline.events.task import MetricInfo
from esper.tolaria.tasks.targets import targets_in
from esper.tolaria.tasks.task import Metric, Sums


def mean_of(column: str) -> Callable[[Sums], float | None]:
    """The mean of a sum over samples."""
    return lambda sums: sums[column] / sums["count"] if sums["count"] else None


def share_of(part: str, whole: str) -> Callable[[Sums], float | None]:
    """One sum over another."""
    return lambda sums: sums[part] / sums[whole] if sums[whole] else None


def count_names(kind: str, classes: int) -> list[str]:
    """Names of one kind of count, such as tp, of each class."""
    return [f"{kind}{k}" for k in range(classes)]


def f1_of(sums: Sums, classes: Sequence[int]) -> float | None:
    """2 TP / (2 TP + FP + FN) over some classes together; None where nothing is and nothing was found."""
    tp, fp, fn = (sum(sums[f"{kind}{k}"] for k in classes) for kind in ("tp", "fp", "fn"))
    return 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else None


def macro_f1(classes: int) -> Metric:
    """The mean of F1 over classes that occur or were found, as scikit-learn has it over the labels that are there."""

    def value(sums: Sums) -> float | None:
        found = [one for k in range(classes) if (one := f1_of(sums, [k])) is not None]
        return sum(found) / len(found) if found else None

    return Metric(MetricInfo(name="f1_macro", unit="share"), value)


def mean_iou(classes: int) -> Metric:
    """The mean over classes that occur or were found of TP / (TP + FP + FN)."""

    def value(sums: Sums) -> float | None:
        found = []
        for k in range(classes):
            tp, fp, fn = (sums[f"{kind}{k}"] for kind in ("tp", "fp", "fn"))
            if tp + fp + fn:
                found.append(tp / (tp + fp + fn))
        return sum(found) / len(found) if found else None

    return Metric(MetricInfo(name="mean_iou", unit="share"), value)


def class_counts(predicted: Tensor, actual: Tensor, valid: Tensor, classes: int) -> dict[str, Tensor]:
    """True positives, false positives and false negatives of each class and sample, [B] each.

    Args:
        predicted: classes, [B, P].
        actual: classes, [B, P].
        valid: positions that count, bool [B, P].
        classes: K.
    """
    sums = {}
    for k in range(classes):
        said, so = (predicted == k) & valid, (actual == k) & valid
        sums[f"tp{k}"] = (said & so).sum(1).double()
        sums[f"fp{k}"] = (said & ~so).sum(1).double()
        sums[f"fn{k}"] = (~said & so).sum(1).double()
    return sums


def entropy_of(targets: Iterable[Any], ignore: int | None = None) -> float:
    """Entropy of the frequencies of classes, in nats; targets that are ignored do not count."""
    counts: dict[int, int] = {}
    for tensor in targets_in(targets):
        values, numbers = torch.unique(tensor if ignore is None else tensor[tensor != ignore], return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + number
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())
