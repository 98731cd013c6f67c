"""Settings of the built-in tasks, and their places in the registry. Nothing here needs torch.

So the launcher can compose and read a run's settings without it; a builder is imported when it first builds.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from esper.leyline.fields import Checks
from esper.leyline.imports import call_later, is_dotted
from esper.tolaria.tasks.registry import register


class Normalise(StrEnum):
    """SAMPLES: a step's loss is the mean over its samples. TOKENS: over all positions of its samples that count."""

    SAMPLES = "samples"
    TOKENS = "tokens"


@dataclass(kw_only=True, slots=True)
class OfDataConfig:
    """The task that the data set is made for: classification of images, language modelling of text."""

    kind: str = "data"
    """Registered name of this kind: ``data``."""


@dataclass(kw_only=True, slots=True)
class SmoothedConfig:
    """What tasks of classes or tokens have."""

    kind: str
    """Registered name; chooses the task."""

    label_smoothing: float = 0.0
    """Share of each label that is spread over all classes or tokens in training, 0 to 1; reports and gates use the
    labels.
    """

    def check_smoothing(self, check: Checks) -> None:
        """Range check of the shared field, reported together with the subclass's own."""
        check("label_smoothing", 0 <= self.label_smoothing < 1, "a share, must be >= 0 and < 1")


@dataclass(kw_only=True, slots=True)
class PlacesConfig(SmoothedConfig):
    """What tasks with a label at many places of a sample have: pixels, hidden tokens, places of a sequence."""

    normalise: Normalise = Normalise.SAMPLES
    """Over what a step's loss is a mean: ``samples``, each the mean of its places that count, or ``tokens``, all such
    places of a step alike, which costs one scalar all-reduce a step. Reports and gates take samples.
    """


def check_weights(config: Any, check: Checks) -> None:
    """Range check of ``class_weights`` and ``balanced``, reported together with the class's own."""
    weights = config.class_weights
    check("class_weights", weights is None or all(w >= 0 for w in weights), "must be >= 0 each")
    check("class_weights", weights is None or not config.balanced, "either these or task.balanced")


@dataclass(kw_only=True, slots=True)
class ClassificationConfig(SmoothedConfig):
    """One class of each sample: logits [B, K], target [B]; loss in nats, accuracy."""

    kind: str = "classification"
    """Registered name of this kind: ``classification``."""

    class_weights: list[float] | None = None
    """Factor of each class's loss, normalised to a mean of 1 over the training part; null: all the same. It counts in
    validation and in evidence as well.
    """

    balanced: bool = False
    """Class weights that are inverse to the classes' frequencies in the training part."""

    mixup: float = 0.0
    """a of the Beta distribution by which training samples are mixed with a partner; 0: they are not."""

    cutmix: float = 0.0
    """The same for boxes that are pasted into training images."""

    f1: bool = False
    """Also counts the macro F1."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_smoothing(check)
            for name in ("mixup", "cutmix"):
                check(name, getattr(self, name) >= 0, "must be >= 0")
            check_weights(self, check)


@dataclass(kw_only=True, slots=True)
class LanguageConfig(SmoothedConfig):
    """The next token at every place: logits [B, T, V], target [B, T]; loss in nats per token, accuracy."""

    kind: str = "language"
    """Registered name of this kind: ``language``."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_smoothing(check)


@dataclass(kw_only=True, slots=True)
class MaskedLanguageConfig(PlacesConfig):
    """Hidden tokens of a sequence: logits [B, T, V]; loss in nats per hidden token, accuracy."""

    kind: str = "masked_language"
    """Registered name of this kind: ``masked_language``."""

    share: float = 0.15
    """Share of the tokens that are asked for."""

    mask_token: int | None = None
    """Token that stands for a hidden one; null: the last of the vocabulary."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("share", 0 < self.share < 1, "must be > 0 and < 1")
            check("mask_token", self.mask_token is None or self.mask_token >= 0, "must be >= 0, or null for the last")
            self.check_smoothing(check)


@dataclass(kw_only=True, slots=True)
class MultiLabelConfig:
    """Any number of labels of a sample: logits [B, K], target [B, K] of 0 and 1; loss in nats, F1."""

    kind: str = "multilabel"
    """Registered name of this kind: ``multilabel``."""

    label_weights: list[float] | None = None
    """Factor of the loss where a label is there, one for each label; null: all 1."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            weights = self.label_weights
            check("label_weights", weights is None or all(w > 0 for w in weights), "must be > 0 each")


@dataclass(kw_only=True, slots=True)
class SegmentationConfig(PlacesConfig):
    """A class of each pixel: logits [B, K, H, W], target [B, H, W]; loss in nats per pixel, mean IoU."""

    kind: str = "segmentation"
    """Registered name of this kind: ``segmentation``."""

    ignore_index: int = 255
    """Target of pixels that do not count."""

    class_weights: list[float] | None = None
    """Factor of each class's loss, normalised to a mean of 1 over the training part's pixels; null: all the same. It
    counts in validation and in evidence as well.
    """

    balanced: bool = False
    """Class weights that are inverse to the classes' frequencies among the pixels of the training part."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_smoothing(check)
            check_weights(self, check)


@dataclass(kw_only=True, slots=True)
class SequenceConfig(PlacesConfig):
    """From sequence to sequence: logits [B, T, V], labels [B, T] with -100 where nothing is asked; nats per token."""

    kind: str = "seq2seq"
    """Registered name of this kind: ``seq2seq``."""

    ignore_index: int = -100
    """Label of places that do not count."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_smoothing(check)


class Error(StrEnum):
    """MSE: squared. L1: absolute. HUBER: squared near zero, absolute far from it."""

    MSE = "mse"
    L1 = "l1"
    HUBER = "huber"


@dataclass(kw_only=True, slots=True)
class RegressionConfig:
    """Numbers of each sample: output and target [B] or [B, D]; MAE, RMSE, R2."""

    kind: str = "regression"
    """Registered name of this kind: ``regression``."""

    loss: Error = Error.MSE
    """Error that is trained: ``mse``, ``l1`` or ``huber``."""

    delta: float = 1.0
    """Where Huber's loss becomes linear, in the target's unit."""

    unit: str = ""
    """Unit of the target, such as kWh; empty: a plain number."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("delta", self.delta > 0, "in the target's unit, must be > 0")


@dataclass(kw_only=True, slots=True)
class ContrastiveConfig:
    """Two views of each sample find each other: output a pair of [B, D], or [B, 2, D]; nats, share found."""

    kind: str = "contrastive"
    """Registered name of this kind: ``contrastive``."""

    group: int = 16
    """Samples among which each is to be found; trainer.batch must be a multiple of it."""

    temperature: float = 0.1
    """T, by which similarities are divided."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("group", self.group >= 2, "samples, must be >= 2")
            check("temperature", self.temperature > 0, "must be > 0")


@dataclass(kw_only=True, slots=True)
class CustomTaskConfig:
    """Where the class is, and its keyword arguments."""

    kind: str = "custom"
    """Registered name of this kind: ``custom``."""

    path: str
    """``package.module:Class``, importable on every rank: a subclass of `esper.Task`, or a function that returns one.
    """

    options: dict[str, Any] | None = None
    """Keyword arguments, {scale: 2.0}; ``bundle``, the data, is given besides where the class takes it. null: none."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("kind", self.kind == "custom", "must be 'custom'")
            check("path", is_dotted(self.path), "write package.module:Class")
            check("options", "bundle" not in (self.options or {}), "bundle is given by the data; leave it out")


BUILDERS = {
    OfDataConfig: "phased:build_of_data",
    ClassificationConfig: "labels:build_classification",
    LanguageConfig: "labels:build_language",
    MaskedLanguageConfig: "masked:build_masked",
    MultiLabelConfig: "multilabel:build_multilabel",
    SegmentationConfig: "positions:build_segmentation",
    SequenceConfig: "positions:build_sequence",
    RegressionConfig: "numbers:build_regression",
    ContrastiveConfig: "pairs:build_contrastive",
    CustomTaskConfig: "custom:build_custom",
}
for _config_class, _builder in BUILDERS.items():
    register(_config_class)(call_later(f"esper.tolaria.tasks.{_builder}"))
