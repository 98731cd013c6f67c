"""Images in Parquet files of the Hugging Face layout: one struct{bytes, path} column, one integer label column.

Images are decoded once into uint8 and normalised when fetched, with mean and deviation of the training part. Both are
computed from a histogram of the bytes in whole numbers, so they do not depend on the order of a sum.
"""

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from esper.leyline.errors import ConfigError, DataError
from esper.tolaria.data.clusters import deal_whole
from esper.tolaria.data.configs import ImagesConfig
from esper.tolaria.data.hashing import split_order
from esper.tolaria.data.image_clusters import read_clusters
from esper.tolaria.data.noise import with_label_noise
from esper.tolaria.data.parts import Bundle, ImagePart, make_bundle
from esper.tolaria.data.registry import data_file, data_root
from esper.tolaria.data.task import Task

_FIX = (
    'mkdir -p FOLDER && python -c "import datasets; '
    "[part.to_parquet(f'FOLDER/{name}.parquet') for name, part in datasets.load_dataset('HUB').items()]\""
)


def channel_statistics(images_NCHW: Tensor, kind: str) -> dict[str, list[float]]:
    """``mean`` and ``std``, the standard deviation, of each channel, in units of the bytes.

    Raises:
        DataError: a channel is constant, so its deviation is zero.
    """
    mean, std = [], []
    for channel in images_NCHW.unbind(1):
        counts = torch.bincount(channel.flatten(), minlength=256).tolist()
        n, total = channel.numel(), sum(value * count for value, count in enumerate(counts))
        total_sq = sum(value * value * count for value, count in enumerate(counts))
        mean.append(total / n)
        std.append(math.sqrt(n * total_sq - total * total) / n)
    if min(std) == 0.0:
        raise DataError(f"data={kind}: channel {std.index(0.0)} of the training images is constant; nothing to learn")
    return {"mean": mean, "std": std}


class _Table:
    """The two columns of one Parquet file; rows are decoded on request."""

    def __init__(self, config: ImagesConfig, path: Path) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
            from PIL import Image
        except ImportError as error:
            raise ConfigError(
                f"data.kind = {config.kind!r}: needs pyarrow and pillow ({error}); pip install 'esper[images]'"
            ) from error
        self._config, self.path, self._pillow = config, path, Image
        layout = (
            f"columns {config.image_column!r} = struct{{bytes, path}} and {config.label_column!r} = int64 "
            "(data.image_column, data.label_column)"
        )
        try:
            with pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                names = ", ".join(f"{field.name}: {field.type}" for field in schema)
                for column, key in ((config.image_column, "image_column"), (config.label_column, "label_column")):
                    if column not in schema.names:
                        raise DataError(
                            f"{path}: no column {column!r}, it has {names}; expected {layout}; "
                            f"set data.{key} to one that is there"
                        )
                image, label = schema.field(config.image_column).type, schema.field(config.label_column).type
                binary = pa.types.is_struct(image) and image.get_field_index("bytes") >= 0
                binary = binary and (
                    pa.types.is_binary(image.field("bytes").type) or pa.types.is_large_binary(image.field("bytes").type)
                )
                if not (binary and pa.types.is_integer(label)):
                    raise DataError(f"{path}: it has {names}; expected {layout}; write the file in that layout")
                table = file.read(columns=[config.image_column, config.label_column])
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: not readable as Parquet ({_one_line(error)}); expected {layout}; get the file again"
            ) from error
        self._images = table.column(config.image_column)
        self.labels = self._check_labels(table.column(config.label_column))

    def _check_labels(self, column: Any) -> Tensor:
        if column.null_count:
            raise DataError(f"{self.path}: {column.null_count} rows without a label; drop them from the file")
        labels = torch.from_numpy(column.to_numpy().astype(np.int64))
        wrong = ((labels < 0) | (labels >= self._config.classes)).nonzero().flatten()
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{self.path}: row {row} has label {int(labels[row])}, expected 0 to {self._config.classes - 1}; "
                "set data.classes to the number of classes of this file"
            )
        return labels

    def __len__(self) -> int:
        return len(self.labels)

    def decode(self, rows: Tensor) -> Tensor:
        """Decodes the images of these rows, uint8 [N, C, H, W]; all must have the size of the first."""
        images: Tensor | None = None
        for place, row in enumerate(rows.tolist()):
            image = self._decode_row(row)
            if images is None:
                images = torch.empty((len(rows), *image.shape), dtype=torch.uint8)
            if image.shape != images.shape[1:]:
                raise DataError(
                    f"{self.path}: row {row} is an image of {list(image.shape)} [C, H, W], others of "
                    f"{list(images.shape[1:])}; resize them to one size"
                )
            images[place] = image
        assert images is not None
        return images

    def _decode_row(self, row: int) -> Tensor:
        cell = self._images[row].as_py()
        data = None if cell is None else cell["bytes"]
        if data is None:
            raise DataError(
                f"{self.path}: row {row} of column {self._config.image_column!r} holds no bytes (a path alone is not "
                "read); write the file with its images embedded"
            )
        try:
            with self._pillow.open(io.BytesIO(data)) as image:
                pixels = np.array(image.convert("RGB" if self._config.channels == 3 else "L"))
        except (OSError, ValueError, SyntaxError, self._pillow.DecompressionBombError) as error:
            unknown = isinstance(error, self._pillow.UnidentifiedImageError)  # its text holds an address in memory
            why = "unknown format" if unknown else _one_line(error)
            raise DataError(
                f"{self.path}: row {row} of column {self._config.image_column!r} is no readable image "
                f"({why}); get the file again, or drop the row"
            ) from error
        return torch.from_numpy(pixels).view(*pixels.shape[:2], -1).permute(2, 0, 1)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _file_entry(path: Path) -> dict[str, Any]:
    hasher = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return {"path": path.name, "bytes": path.stat().st_size, "xxh3_64": hasher.hexdigest()}


def load_images(config: ImagesConfig, learned: Mapping[str, Any] | None = None) -> Bundle:
    """Reads both files; x is float32 [N, C, H, W] with the training part's mean 0 and deviation 1 per channel."""
    layout = (
        f"train.parquet and test.parquet (columns {config.image_column!r} = struct{{bytes, path}}, "
        f"{config.label_column!r} = int64)"
    )
    fix = _FIX.replace("HUB", config.hub)
    root = data_root(config, config.root, config.folder, layout, fix)
    paths = {name: data_file(root, f"{name}.parquet", layout, fix) for name in ("train", "test")}
    train, test = _Table(config, paths["train"]), _Table(config, paths["test"])
    held = {"validation": config.validation, "probe": config.probe}
    clusters = read_clusters(config, train.path)
    if clusters is None:
        order = split_order(config, len(train), sum(held.values()), str(train.path))
        rest = len(train) - sum(held.values())
        rows = dict(zip((*held, "train"), order.split([*held.values(), rest]), strict=True))
    else:
        rows = deal_whole(clusters, held, config.split_seed, f"data={config.kind}: {train.path}")
    rows["train"] = rows["train"][: config.max_train]
    images = {name: train.decode(places) for name, places in rows.items()}
    labels = {name: train.labels[places] for name, places in rows.items()}
    labels["train"] = with_label_noise(
        labels["train"], config.label_noise, classes=config.classes, split_seed=config.split_seed
    )
    if len(test) < 2:
        raise DataError(f"{test.path}: {len(test)} rows, expected at least 2; get the file again")
    images["test"], labels["test"] = test.decode(torch.arange(len(test))), test.labels
    shapes = {name: tuple(part.shape[1:]) for name, part in images.items()}
    if len(set(shapes.values())) > 1:
        raise DataError(f"{root}: images of unequal sizes [C, H, W]: {shapes}; resize them to one size")

    learned = learned or channel_statistics(images["train"], config.kind)
    return make_bundle(
        name=config.kind,
        task=Task.CLASSIFICATION,
        input_shape=shapes["train"],
        classes=config.classes,
        parts={name: ImagePart(images[name], labels[name], **learned) for name in images},
        record={"files": [_file_entry(path) for path in paths.values()], "learned": learned},
        augment=config.augment,
        crop_pad=config.crop_pad,
        probe_clusters=None if clusters is None else clusters[rows["probe"]],
        train_clusters=None if clusters is None else clusters[rows["train"]],
        refills=config.label_noise == 0.0,
    )
