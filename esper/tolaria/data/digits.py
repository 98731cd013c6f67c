"""Handwritten digits that ship inside scikit-learn: 1,797 grey images of 8 x 8 pixels, 10 classes.

Source: E. Alpaydin, C. Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998 (its test part).
"""

import gzip
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.leyline.errors import DataError
from esper.tolaria.data.configs import DigitsConfig
from esper.tolaria.data.hashing import split_order
from esper.tolaria.data.images import channel_statistics
from esper.tolaria.data.noise import with_label_noise
from esper.tolaria.data.parts import Bundle, ImagePart, make_bundle
from esper.tolaria.data.task import Task


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


def load_digits(config: DigitsConfig, learned: Mapping[str, Any] | None = None) -> Bundle:
    """Reads the digits; x is float32 [N, 1, 8, 8] with the training part's mean 0 and deviation 1."""
    images, labels = read_digits()
    held = {"test": config.test, "validation": config.validation, "probe": config.probe}
    order = split_order(config, len(labels), sum(held.values()), "digits")
    places = dict(zip((*held, "train"), order.split([*held.values(), len(labels) - sum(held.values())])))
    learned = learned or channel_statistics(images[places["train"]], config.kind)
    targets = {name: labels[rows] for name, rows in places.items()}
    targets["train"] = with_label_noise(targets["train"], config.label_noise, classes=10, split_seed=config.split_seed)
    parts = {name: ImagePart(images[rows], targets[name], **learned) for name, rows in places.items()}
    return make_bundle(
        name=config.kind,
        task=Task.CLASSIFICATION,
        input_shape=(1, 8, 8),
        classes=10,
        parts=parts,
        record={"files": [], "learned": learned},
        refills=config.label_noise == 0.0,
    )
