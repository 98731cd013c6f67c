"""What metrics of classes are made of: counts of each class and sample, which add up over samples.

Shapes: B samples, K classes, P positions of a sample.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from esper.leyline.errors import ConfigError
from esper.leyline.events.task import MetricInfo
from esper.tolaria.data.parts import Bundle
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


def weights_of(config: Any, bundle: Bundle, ndim: int, ignore: int | None = None) -> Tensor | None:
    """Class weights, normalised to a mean of 1 over the training part, float64 [K]; None: all are the same.

    Args:
        config: has ``kind``, ``class_weights`` and ``balanced``.
        bundle: the data; its training part is read whole if there are weights.
        ndim: axes of a batch of targets.
        ignore: target that does not count.

    Raises:
        ConfigError: they are not one for each class, or none of a training sample is above 0; targets are no classes.
    """
    if not config.balanced and config.class_weights is None:
        return None
    if config.class_weights is not None and len(config.class_weights) != bundle.classes:
        raise ConfigError(
            f"task.class_weights: {len(config.class_weights)} for {bundle.classes} classes; give one for each"
        )
    counts = torch.zeros(bundle.classes, dtype=torch.float64)
    for rows in torch.arange(len(bundle.train)).split(1024):
        target = bundle.train.fetch(rows)[1]
        if not isinstance(target, Tensor) or target.ndim != ndim or target.is_floating_point():
            of = "sample" if ndim == 1 else "pixel"
            raise ConfigError(
                f"task.kind = {config.kind!r}: class weights need one whole number as the target of each {of}"
            )
        known = target[(target >= 0) & (target < bundle.classes) & (target != (-1 if ignore is None else ignore))]
        counts += torch.bincount(known, minlength=bundle.classes)
    raw = counts.clamp(min=1).reciprocal() if config.balanced else torch.tensor(config.class_weights).double()
    mean = float((raw * counts).sum() / counts.sum())
    if not mean > 0:
        raise ConfigError("task.class_weights: no training sample has a weight above 0; raise some")
    return raw / mean


def entropy_of(targets: Iterable[Any], ignore: int | None = None) -> float:
    """Entropy of the frequencies of classes, in nats; targets that are ignored do not count."""
    counts: dict[int, int] = {}
    for tensor in targets_in(targets):
        values, numbers = torch.unique(tensor if ignore is None else tensor[tensor != ignore], return_counts=True)
        for value, number in zip(values.tolist(), numbers.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + number
    total = sum(counts.values())
    return -sum(count / total * math.log(count / total) for count in counts.values())
