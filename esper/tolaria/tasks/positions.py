"""Classes of positions, some of which are ignored: of pixels, and of places in a sequence.

An image or a sequence is one sample: its loss is the mean over its own positions that count, and its share of correct
answers likewise. Metrics over positions (token accuracy, IoU) add positions up over all samples first.

Shapes: B samples, K classes, P = H x W pixels or T tokens.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from esper.leyline.events.task import MetricInfo
from esper.tolaria.data.parts import Bundle
from esper.tolaria.tasks.configs import Normalise, SegmentationConfig, SequenceConfig
from esper.tolaria.tasks.counts import class_counts, count_names, entropy_of, mean_iou, share_of, weights_of
from esper.tolaria.tasks.task import Metric, Scores, Task, read_logits


class PositionTask(Task):
    """Classes of positions, some of which are ignored: segmentation, masked language, sequence to sequence.

    Args:
        name: of the task.
        ignore: target that is ignored.
        classes: classes of which IoU is counted; 0: none.
        pixels: logits are [B, K, H, W] and not [B, T, K].
        smoothing: label smoothing in training.
        normalise: over what a step's loss is a mean.
        weights: factor of each class's loss, [K]; None: 1.
    """

    graded = True

    def __init__(
        self,
        name: str,
        ignore: int,
        *,
        classes: int = 0,
        pixels: bool = False,
        smoothing: float = 0,
        normalise: Normalise = Normalise.SAMPLES,
        weights: Tensor | None = None,
    ) -> None:
        self.by_positions = normalise is Normalise.TOKENS
        self.name, self.ignore, self.classes, self.pixels, self.smoothing = name, ignore, classes, pixels, smoothing
        self.weights = weights
        if weights is not None:
            self.unit = "weighted nats"
        kinds = [name for of in ("tp", "fp", "fn") for name in count_names(of, classes)]
        self.columns = ["hits", "positions", *kinds]
        where = "pixel" if pixels else "token"
        accuracy = Metric(MetricInfo(name=f"{where}_accuracy", unit="share"), share_of("hits", "positions"))
        self.metrics = [accuracy, *([mean_iou(classes)] if classes else [])]
        self.objective = "mean_iou" if classes else "loss"

    def _read(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probabilities [B, P, K] in at least float32, targets [B, P], and where they count [B, P]."""
        logits = read_logits(output, self.name)
        channels = 1 if self.pixels else -1
        expected = "logits [B, K, H, W] and target [B, H, W]" if self.pixels else "logits [B, T, V] and target [B, T]"
        if logits.ndim != (4 if self.pixels else 3) or logits.movedim(channels, -1).shape[:-1] != target.shape:
            raise ValueError(f"got logits {list(logits.shape)} and target {list(target.shape)}, expected {expected}")
        logits = logits.movedim(channels, -1).flatten(1, -2)
        logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        flat = target.flatten(1)
        return logp, flat, flat != self.ignore

    @property
    def learns_otherwise(self) -> bool:
        """Whether labels are smoothed."""
        return self.smoothing > 0

    def score(self, output: Any, target: Any) -> Scores:
        """Cross-entropy in nats, the mean over a sample's positions that count; 0 where none does."""
        logp, flat, valid = self._read(output, target)
        number = valid.sum(1)
        labels = flat.clamp(min=0).where(valid, 0)
        own = -logp.gather(-1, labels[..., None])[..., 0]
        own = own if self.weights is None else own * self.weights.to(own)[labels]
        loss = own.where(valid, 0.0).sum(1) / number.clamp(min=1)
        said = logp.argmax(-1)
        hits = ((said == flat) & valid).sum(1)
        sums = {"hits": hits.double(), "positions": number.double()}
        sums |= class_counts(said, flat, valid, self.classes)
        return Scores(loss, hits.to(loss.dtype) / number.clamp(min=1), sums)

    def learn(self, output: Any, target: Any) -> Tensor:
        """The same against labels of which a share is spread over all classes."""
        logp, flat, valid = self._read(output, target)
        each = logp.mean(-1)
        if self.weights is not None:
            each = each * self.weights.to(each)[flat.clamp(min=0).where(valid, 0)]
        uniform = -(each.where(valid, 0.0)).sum(1) / valid.sum(1).clamp(min=1)
        return (1 - self.smoothing) * self.score(output, target).loss + self.smoothing * uniform

    def positions(self, target: Any) -> Tensor:
        """See `Task.positions`."""
        counted: Tensor = target.flatten(1) != self.ignore
        return counted.sum(1)

    def answers(self, output: Any) -> dict[str, Tensor]:
        """The likeliest class of each position."""
        return {"class": read_logits(output, self.name).argmax(1 if self.pixels else -1)}

    def chance(self, targets: Iterable[Any]) -> float:
        """Entropy of the frequencies of classes; 0, not known, where they have weights."""
        return 0.0 if self.weights is not None else entropy_of(targets, self.ignore)


def build_segmentation(config: SegmentationConfig, bundle: Bundle) -> Task:
    """A class of each pixel."""
    more: dict[str, Any] = {"classes": bundle.classes, "pixels": True, "smoothing": config.label_smoothing}
    more |= {"normalise": config.normalise, "weights": weights_of(config, bundle, 3, config.ignore_index)}
    return PositionTask(config.kind, config.ignore_index, **more)


def build_sequence(config: SequenceConfig, bundle: Bundle) -> Task:
    """Labels of a sequence."""
    how: dict[str, Any] = {"smoothing": config.label_smoothing, "normalise": config.normalise}
    return PositionTask(config.kind, config.ignore_index, **how)
