"""Classification of samples, and of the next token at every place: what the built-in data sets are made for.

Shapes: B samples, K classes, T tokens, V tokens of a vocabulary.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from esper.accord.verdict import chance_level
from esper.tolaria.data.parts import Bundle, Part
from esper.tolaria.data.task import Task as Labels
from esper.tolaria.tasks.configs import ClassificationConfig, LanguageConfig
from esper.tolaria.tasks.counts import class_counts, count_names, macro_f1, weights_of
from esper.tolaria.tasks.mixing import MixedPart
from esper.tolaria.tasks.targets import targets_in
from esper.tolaria.tasks.task import Scores, Task, read_logits


class LabelTask(Task):
    """Classification of samples or of each token, as data sets are made for it.

    Args:
        kind: what the logits are.
        smoothing: label smoothing in training, 0 to 1.
        weights: factor of each class's loss, [K]; None: 1.
        f1: classes of which F1 is counted; 0: none.
        mix: how training samples are mixed, as for `MixedPart`; None: not at all.
    """

    objective, graded = "accuracy", True

    def __init__(
        self,
        kind: Labels,
        *,
        smoothing: float = 0.0,
        weights: Tensor | None = None,
        f1: int = 0,
        mix: dict[str, float] | None = None,
    ) -> None:
        self.kind, self.name, self.class_logits = kind, kind.value, kind is Labels.CLASSIFICATION
        self.smoothing, self.weights, self.classes, self.mix = smoothing, weights, f1, mix or {}
        self.columns = [name for of in ("tp", "fp", "fn") for name in count_names(of, f1)]
        self.metrics = [macro_f1(f1)] if f1 else []
        if weights is not None:
            self.unit = "weighted nats"

    def prepare(self, part: Part) -> Part:
        """The part with samples mixed in training, if the settings say so."""
        return MixedPart(part, **self.mix) if any(self.mix.values()) else part

    @property
    def learns_otherwise(self) -> bool:
        """Whether labels are smoothed."""
        return self.smoothing > 0

    def score(self, output: Any, target: Any) -> Scores:
        """Cross-entropy in nats, and what is right."""
        logits = read_logits(output, self.name)
        loss, correct = self.kind.per_sample(logits, target)
        if self.weights is not None:
            loss = loss * self.weights.to(loss)[target]
        if not self.classes:
            return Scores(loss, correct)
        said = logits.argmax(-1)[:, None]
        counts = class_counts(said, target[:, None], torch.ones_like(said, dtype=torch.bool), self.classes)
        return Scores(loss, correct, counts)

    def learn(self, output: Any, target: Any) -> Tensor:
        """The same against labels of which a share is spread over all classes."""
        logits = read_logits(output, self.name)
        scores = self.score(output, target)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        uniform = -torch.log_softmax(wide, -1).mean(-1)
        if self.weights is not None:
            uniform = uniform * self.weights.to(uniform)[target]
        uniform = uniform if uniform.ndim == 1 else uniform.mean(1)
        return (1 - self.smoothing) * scores.loss + self.smoothing * uniform

    def answers(self, output: Any) -> dict[str, Tensor]:
        """The likeliest class, and its probability."""
        best = torch.softmax(read_logits(output, self.name).double(), -1).max(-1)
        return {"class": best.indices, "probability": best.values}

    def chance(self, targets: Iterable[Any]) -> float:
        """Entropy of the targets' frequencies."""
        return chance_level(label for tensor in targets_in(targets) for label in tensor.flatten().tolist())


def build_classification(config: ClassificationConfig, bundle: Bundle) -> Task:
    """Classification; class weights are normalised by the training part."""
    return LabelTask(
        Labels.CLASSIFICATION,
        smoothing=config.label_smoothing,
        weights=weights_of(config, bundle, 1),
        f1=bundle.classes if config.f1 else 0,
        mix={"mixup": config.mixup, "cutmix": config.cutmix},
    )


def build_language(config: LanguageConfig, bundle: Bundle) -> Task:
    """Language modelling."""
    return LabelTask(Labels.LANGUAGE, smoothing=config.label_smoothing)
