"""Data sets of the library datasets: what lies on this machine, or by name what lies on the hub.

images   float32 [N, C, H, W], bytes scaled to -1 ... 1; decoded when fetched, from files that Arrow maps into memory
texts    int64 [N, T], as tokenizer.json makes them; with a target, or joined and cut into windows for the next token
tables   as data=table has them

Rows are fetched by number, so a run saves its cursor alone. Nothing is downloaded unless ``data.hub`` says so, and no
code comes with a data set: the library runs none.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from esper.leyline.errors import ConfigError, DataError, one_line
from esper.tolaria.data.clusters import deal_whole, number_labels
from esper.tolaria.data.configs import HFDataConfig, Target
from esper.tolaria.data.corpus import deal
from esper.tolaria.data.hashing import split_order
from esper.tolaria.data.own.custom import LOOKED_AT, digest_some
from esper.tolaria.data.own.table import Targets, bundle_of_tables, columns_of, read_targets
from esper.tolaria.data.parts import PART_NAMES, Bundle, Part, make_bundle
from esper.tolaria.data.task import Task

BY_SUFFIX = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv", ".arrow": "arrow"}
SAVED = ("state.json", "dataset_dict.json")  # in a folder that `save_to_disk` wrote


def read_splits(config: HFDataConfig) -> dict[str, Any]:
    """The splits "train" and, if there is one, "test".

    Raises:
        ConfigError: the library is not installed.
        DataError: there is nothing to read, or it cannot be read.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(f"data=hf: needs datasets ({error}); pip install 'esper[datasets]'") from error
    path = Path(config.path).expanduser()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if path.is_dir() and any((path / name).is_file() for name in SAVED):
                found = datasets.load_from_disk(str(path))
            elif path.is_dir():
                found = datasets.load_dataset(str(path))
            elif path.is_file():
                if path.suffix not in BY_SUFFIX:
                    raise DataError(f"{path}: expected a name that ends in {', '.join(BY_SUFFIX)}")
                found = datasets.load_dataset(BY_SUFFIX[path.suffix], data_files={"train": str(path)})
            elif config.hub:
                found = datasets.load_dataset(config.path, config.subset)
            else:
                raise DataError(
                    f"{path}: no such folder or file; correct data.path, or set data.hub=true if it is on the hub"
                )
    except DataError:
        raise
    except Exception as error:  # the library's errors have no common class
        told = one_line(error)
        raise DataError(f"{config.path}: cannot be read as a data set ({told})") from None
    splits = {"train": found} if isinstance(found, datasets.Dataset) else dict(found)
    if "train" not in splits:
        raise DataError(f"{config.path}: no split train; it has {', '.join(splits)}")
    for which in splits.keys() & {"train", "test"}:
        named = [config.image, config.text, config.cluster_column, *config.target]
        for name in named:
            if name is not None and name not in splits[which].column_names:
                there = ", ".join(splits[which].column_names)
                raise DataError(f"{config.path}: no column {name!r} in {which}, it has {there}; correct data.*")
    return {which: splits[which] for which in ("train", "test") if which in splits}


class ImageRows(Part):
    """Images of a data set, with targets.

    Args:
        config: which column, channels and side.
        dataset: of the library.
        rows: which of its rows, int64 [N].
        y: targets of all its rows.
    """

    def __init__(self, config: HFDataConfig, dataset: Any, rows: Tensor, y: Tensor) -> None:
        self._config, self._rows, self._y = config, rows, y
        self._dataset = dataset.select_columns([config.image])

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Part.fetch`; x is float32 [N, C, H, W]."""
        rows, config = self._rows[indices], self._config
        images = [self._read(row, image) for row, image in zip(rows.tolist(), self._images(rows), strict=True)]
        sizes = sorted({image.shape for image in images})
        if len(sizes) > 1:
            told = " and ".join("x".join(map(str, size[1:])) for size in sizes[:2])
            raise DataError(f"{config.path}: images of {told} pixels; set data.side to scale them to one size")
        return torch.stack(images).to(torch.float32).div_(127.5).sub_(1.0), self._y[rows]

    def _images(self, rows: Tensor) -> list[Any]:
        found: list[Any] = self._dataset[rows.tolist()][self._config.image]
        return found

    def _read(self, row: int, image: Any) -> Tensor:
        config = self._config
        if not hasattr(image, "convert"):
            raise DataError(
                f"{config.path}: row {row} of {config.image!r} is {type(image).__name__}, no image; correct data.image"
            )
        image = image.convert("L" if config.channels == 1 else "RGB")
        if config.side is not None:
            image = image.resize((config.side, config.side))
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if config.channels == 1 else pixels.permute(2, 0, 1)

    def content(self) -> tuple[Tensor, ...]:
        """Some samples, and where all of them lie."""
        x, y = self.fetch(torch.arange(min(LOOKED_AT, len(self))))
        return self._rows, x, y


class TokenRows(Part):
    """Rows of tokens that are in memory.

    Args:
        x: int64 [N, T].
        y: targets, [N, ...].
    """

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._x, self._y = x, y

    def __len__(self) -> int:
        return len(self._x)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Part.fetch`."""
        return self._x[indices], self._y[indices]

    def content(self) -> tuple[Tensor, ...]:
        """Tokens and targets."""
        return self._x, self._y


def _tokenizer(config: HFDataConfig) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ConfigError(f"data=hf: needs tokenizers ({error}); pip install 'esper[datasets]'") from error
    path = Path(str(config.tokenizer)).expanduser()
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise DataError(f"{path}: no tokenizer.json of the library tokenizers ({one_line(error)})") from None


def _encode(config: HFDataConfig, tokenizer: Any, dataset: Any) -> list[list[int]]:
    texts = dataset[config.text][:]
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{config.path}: row {row} of {config.text!r} is {text!r:.40}, expected a text")
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def _padded(config: HFDataConfig, tokens: list[list[int]]) -> Tensor:
    rows = [row[: config.block] for row in tokens]
    return torch.tensor([row + [config.filler] * (config.block - len(row)) for row in rows])


def _windows(config: HFDataConfig, tokens: list[list[int]]) -> Tensor:
    """Windows of the joined texts, int64 [N, block + 1]."""
    joined = torch.tensor([token for row in tokens for token in row])
    count = len(joined) // (config.block + 1)
    return joined[: count * (config.block + 1)].reshape(count, config.block + 1)


def _next_tokens(windows: Tensor) -> Part:
    return TokenRows(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())


def _deal(config: HFDataConfig, splits: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Rows of each part that comes from the split train, and the cluster of each row."""
    size, what = len(splits["train"]), f"data=hf: {config.path}"
    held = {"validation": config.validation, "probe": config.probe}
    held |= {} if "test" in splits else {"test": config.test}
    if config.cluster_column is not None:
        labels = number_labels([str(one) for one in splits["train"][config.cluster_column]])
        return deal_whole(labels, held, config.split_seed, what), labels
    order = split_order(config, size, sum(held.values()), what)
    return dict(zip((*held, "train"), order.split([*held.values(), size - sum(held.values())]), strict=True)), None


def _targets(config: HFDataConfig, splits: dict[str, Any], classes: list[str] | None) -> Targets:
    columns = {which: split.select_columns(config.target) for which, split in splits.items()}
    tables = {which: columns_of(split.with_format("arrow")[:]) for which, split in columns.items()}
    return read_targets(config, tables, {which: Path(config.path) for which in tables}, classes)


def _of_texts(config: HFDataConfig, splits: dict[str, Any], known: list[str] | None) -> Bundle:
    tokenizer = _tokenizer(config)
    tokens = {which: _encode(config, tokenizer, split) for which, split in splits.items()}
    vocabulary = tokenizer.get_vocab_size()
    if config.target:
        rows, labels = _deal(config, splits)
        targets = _targets(config, splits, known)
        x = {which: _padded(config, found) for which, found in tokens.items()}
        y = targets.of
        parts: dict[str, Part] = {name: TokenRows(x["train"][where], y["train"][where]) for name, where in rows.items()}
        if "test" in splits:
            parts["test"] = TokenRows(x["test"], y["test"])
        record = {"vocabulary": vocabulary, "learned": {"classes": targets.classes}}
        return _bundle(config, parts, targets.count, (config.block,), rows, labels, record)
    held = {"validation": config.validation, "probe": config.probe}
    held |= {} if "test" in splits else {"test": config.test}
    windows = {which: _windows(config, found) for which, found in tokens.items()}
    rows = deal(config, windows["train"], held, config.path)
    parts = {name: _next_tokens(windows["train"][where]) for name, where in rows.items()}
    if "test" in splits:
        parts["test"] = _next_tokens(windows["test"])
    return _bundle(config, parts, vocabulary, (config.block,), rows, None, {"vocabulary": vocabulary})


def _bundle(
    config: HFDataConfig,
    parts: dict[str, Part],
    classes: int,
    shape: tuple[int, ...],
    rows: dict[str, Tensor],
    labels: Tensor | None,
    record: dict[str, Any],
) -> Bundle:
    kinds = {Target.CLASS: Task.CLASSIFICATION}
    return make_bundle(
        name=config.kind,
        task=kinds.get(config.target_kind) if config.target else Task.LANGUAGE,
        input_shape=shape,
        classes=classes,
        parts={name: parts[name] for name in PART_NAMES},
        record={"path": config.path, **record},
        probe_clusters=None if labels is None else labels[rows["probe"]],
        train_clusters=None if labels is None else labels[rows["train"]],
        digest=digest_some(parts, ""),
    )


def load_hf(config: HFDataConfig, learned: Mapping[str, Any] | None = None) -> Bundle:
    """Reads a data set of the library datasets.

    Args:
        config: its settings.
        learned: see `load_data`.

    Raises:
        ConfigError: a library is not installed.
        DataError: it cannot be read, lacks a column, or a sample is not what it is said to be.
    """
    splits = read_splits(config)
    known = learned["classes"] if learned else None
    if config.text is not None:
        return _of_texts(config, splits, known)
    if config.image is None:
        tables = {which: columns_of(split.with_format("arrow")[:]) for which, split in splits.items()}
        paths = {which: Path(config.path) for which in tables}
        return bundle_of_tables(config, tables, paths, [{"path": config.path}], learned)
    rows, labels = _deal(config, splits)
    targets = _targets(config, splits, known)
    y = targets.of
    parts: dict[str, Part] = {n: ImageRows(config, splits["train"], where, y["train"]) for n, where in rows.items()}
    if "test" in splits:
        parts["test"] = ImageRows(config, splits["test"], torch.arange(len(splits["test"])), y["test"])
    x, _ = parts["train"].fetch(torch.arange(2))
    record = {"learned": {"classes": targets.classes}}
    return _bundle(config, parts, targets.count, tuple(x.shape[1:]), rows, labels, record)
