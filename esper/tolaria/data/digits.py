"""Handwritten digits that ship inside scikit-learn: 1,797 grey images of 8 x 8 pixels, 10 classes.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
"""

from dataclasses import dataclass

import numpy as np
import torch

from esper.leyline.fields import Checks
from esper.tolaria.data.images import channel_statistics
from esper.tolaria.data.noise import with_label_noise
from esper.tolaria.data.parts import Bundle, ImagePart, make_bundle
from esper.tolaria.data.registry import DataConfig, register, split_order
from esper.tolaria.data.task import Task


@dataclass(kw_only=True, slots=True)
class DigitsConfig(DataConfig):
    """scikit-learn's digits; needs no download."""

    kind: str = "digits"
    """Registered name of this kind: ``digits``."""

    validation: int = 240
    """Samples in the validation part; the rest of 1,797 is for training."""

    probe: int = 384
    """Samples in the probe part, from which evidence is drawn."""

    test: int = 300
    """Samples in the test part."""

    label_noise: float = 0.0
    """Share of the training labels that are wrong, 0 to 1."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            check("test", self.test >= 2, "samples, must be >= 2")
            check("label_noise", 0 <= self.label_noise <= 1, "share of the training labels, must be 0 to 1")


@register(DigitsConfig)
def load_digits(config: DigitsConfig) -> Bundle:
    """Reads the digits; x is float32 [N, 1, 8, 8] with the training part's mean 0 and deviation 1."""
    from sklearn import datasets  # a second of import that no other data set should pay

    source = datasets.load_digits()
    images = torch.from_numpy(source.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(source.target.astype(np.int64))

    held = {"test": config.test, "validation": config.validation, "probe": config.probe}
    order = split_order(config, len(labels), sum(held.values()), "digits")
    places = dict(zip((*held, "train"), order.split([*held.values(), len(labels) - sum(held.values())])))
    mean, std = channel_statistics(images[places["train"]], config.kind)
    targets = {name: labels[rows] for name, rows in places.items()}
    targets["train"] = with_label_noise(targets["train"], config.label_noise, classes=10, split_seed=config.split_seed)
    parts = {name: ImagePart(images[rows], targets[name], mean, std) for name, rows in places.items()}
    return make_bundle(
        name=config.kind,
        task=Task.CLASSIFICATION,
        input_shape=(1, 8, 8),
        classes=10,
        parts=parts,
        record={"files": [], "mean": mean, "std": std},
        refills=config.label_noise == 0.0,
    )
