"""Settings of data sets of images."""

from dataclasses import dataclass
from enum import StrEnum
from typing import ClassVar

from esper.leyline.fields import Checks
from esper.tolaria.data.registry import DataConfig


class Augment(StrEnum):
    """The augmentation of training images. CROP_FLIP shifts by up to ``crop_pad`` pixels, and mirrors half of them."""

    NONE = "none"
    CROP_FLIP = "crop_flip"


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
            check("label_noise", 0 <= self.label_noise <= 1, "share of the training labels, must be 0 to 1")


@dataclass(kw_only=True, slots=True)
class ImagesConfig(DataConfig):
    """Any image Parquet: a folder with train.parquet and test.parquet; all images of one size."""

    folder: ClassVar[str | None] = None
    hub: ClassVar[str] = "NAME"

    kind: str = "images"
    """Registered name of this kind: ``images``."""

    root: str | None = None
    """Folder with train.parquet and test.parquet; null: the data set's own folder below the one that ESPER_DATA names,
    where it has one.
    """

    image_column: str = "image"
    """Column of the images, struct{bytes, path}; often ``img`` or ``image``."""

    label_column: str = "label"
    """Column of the labels, integers from 0 to classes - 1."""

    classes: int = 10
    """Number of labels."""

    channels: int = 3
    """3: images are read as RGB. 1: as grey."""

    validation: int = 2000
    """Images cut from train.parquet for the validation part."""

    probe: int = 2000
    """Images cut from train.parquet for the probe part, from which evidence is drawn."""

    max_train: int | None = None
    """Training images at most; null: all that are left."""

    augment: Augment = Augment.NONE
    """What happens to training images: ``none``, or ``crop_flip`` (shifted by up to ``crop_pad`` pixels, and every
    second one mirrored).
    """

    crop_pad: int = 4
    """Pixels by which crop_flip shifts at most."""

    label_noise: float = 0.0
    """Share of the training labels that are wrong, 0 to 1."""

    cluster_column: str | None = None
    """Column of train.parquet that names what an image belongs to, such as its patient. Images of one cluster are dealt
    to one part, which may then be larger than asked for. null: each image is its own, unless another field says.
    """

    cluster_csv: str | None = None
    """File in the data set's folder that says the same: a CSV with a header and the columns path and cluster."""

    cluster_folder: int | None = None
    """Level of the folder in an image's path that says the same: 0 is the first, -1 the one that holds the file."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            check("root", self.root != "", "must name a folder, or null for the one below ESPER_DATA")
            check("classes", self.classes >= 2, "must be >= 2")
            check("channels", self.channels in (1, 3), "must be 3 (RGB) or 1 (grey)")
            check("max_train", self.max_train is None or self.max_train >= 2, "images, must be >= 2, or null for all")
            check("crop_pad", self.crop_pad >= 1, "pixels, must be >= 1")
            check("label_noise", 0 <= self.label_noise <= 1, "share of the training labels, must be 0 to 1")
            for name in ("cluster_column", "cluster_csv"):
                check(name, getattr(self, name) != "", "must name one, or null")
            said = [self.cluster_column, self.cluster_csv, self.cluster_folder]
            once = sum(value is not None for value in said) <= 1
            check("cluster_column", once, "at most one of cluster_column, cluster_csv and cluster_folder")


@dataclass(kw_only=True, slots=True)
class Cifar10Config(ImagesConfig):
    """CIFAR-10 in Parquet. ``root`` null: the folder cifar10 below the one that ESPER_DATA names."""

    folder: ClassVar[str | None] = "cifar10"
    hub: ClassVar[str] = "uoft-cs/cifar10"

    kind: str = "cifar10"
    """Registered name of this kind: ``cifar10``."""

    image_column: str = "img"
