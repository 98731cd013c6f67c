"""Handwritten digits that ship inside scikit-learn: 1,797 grey images of 8 x 8 pixels, 10 classes.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
"""

import gzip
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from esper.leyline.errors import DataError
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


def read_digits() -> tuple[Tensor, Tensor]:
    """Images, uint8 [1797, 1, 8, 8], and labels, int64 [1797], from the file inside scikit-learn.

    scikit-learn itself is not imported: that takes each rank more than a second.

    Raises:
        DataError: the file is not there.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("data=digits: scikit-learn, which holds the digits, is not installed; pip install scikit-learn")
    path = Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path, "rt") as file:
            rows = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.uint8))
        if rows.shape != (1797, 65):
            raise ValueError(f"{list(rows.shape)} values instead of [1797, 65]")
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"data=digits: {path}: cannot be read ({error}); install scikit-learn anew") from None
    return rows[:, :-1].reshape(-1, 1, 8, 8), rows[:, -1].long()


@register(DigitsConfig)
def load_digits(config: DigitsConfig) -> Bundle:
    """Reads the digits; x is float32 [N, 1, 8, 8] with the training part's mean 0 and deviation 1."""
    images, labels = read_digits()
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
