"""Text as bytes: windows of ``block`` + 1 bytes that do not overlap, 256 classes, no tokenizer to ship.

Where parts are cut from one corpus, windows are dealt in *stretches* of 32 neighbours, so that the parts are pieces
of text rather than sentences torn apart between training and test. The probe part alone is dealt window by window:
what a seed does to one window it tends to do to the next (paired differences within a stretch correlate by 0.1 to 0.4),
so a probe of 1,024 windows in 32 stretches would say little more than 32 samples do. No byte is in two parts.
"""

import os
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from esper.leyline.errors import DataError
from esper.leyline.fields import Checks
from esper.tolaria.data.hashing import hashed_order
from esper.tolaria.data.parts import Bundle, BytePart, make_bundle
from esper.tolaria.data.registry import DataConfig, data_file, data_root, register
from esper.tolaria.data.task import Task

STRETCH = 32  # neighbouring windows that are dealt together
VOCABULARY = 256


@dataclass(kw_only=True, slots=True)
class PySourceConfig(DataConfig):
    """Source code of the running Python's own standard library; needs no download. Another Python is another corpus."""

    kind: str = "pysource"
    """Registered name of this kind: ``pysource``."""

    block: int = 64
    """Bytes that the model sees of a sample."""

    max_bytes: int = 1_000_000
    """Size of the corpus in bytes, at most."""

    validation: int = 512
    """Samples in the validation part; the rest is for training."""

    probe: int = 1024
    """Samples in the probe part, from which evidence is drawn."""

    test: int = 1024
    """Samples in the test part."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            check("test", self.test >= 2, "samples, must be >= 2")
            check("block", self.block >= 1, "bytes, must be >= 1")
            check("max_bytes", self.max_bytes >= 1, "must be >= 1")


@dataclass(kw_only=True, slots=True)
class TextConfig(DataConfig):
    """A folder with train.txt and test.txt. ``root`` null: the folder wikitext2 below the one that ESPER_DATA names."""

    kind: str = "text"
    """Registered name of this kind: ``text``."""

    root: str | None = None
    """Folder with train.txt and test.txt; null: wikitext2 below the folder that ESPER_DATA names."""

    block: int = 64
    """Bytes that the model sees of a sample."""

    max_bytes: int | None = None
    """Bytes read of each file at most; null: all."""

    validation: int = 512
    """Samples cut from train.txt for the validation part."""

    probe: int = 1024
    """Samples cut from train.txt for the probe part, from which evidence is drawn."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            self.check_split(check)
            check("block", self.block >= 1, "bytes, must be >= 1")
            check("root", self.root != "", "must name a folder, or null for the one below ESPER_DATA")
            check("max_bytes", self.max_bytes is None or self.max_bytes >= 1, "must be >= 1, or null for all")


def cut_windows(corpus: bytes, block: int) -> Tensor:
    """Cuts a corpus into windows, uint8 [N, block + 1]; the rest at the end that fills no window is left out."""
    count = len(corpus) // (block + 1)
    return torch.from_numpy(np.frombuffer(corpus, np.uint8, count * (block + 1)).copy()).view(count, block + 1)


def deal(config: DataConfig, windows: Tensor, held: dict[str, int], what: str) -> dict[str, Tensor]:
    """Deals windows to the ``held`` parts, and the rest to "train": those of "probe" singly, the others in stretches.

    Args:
        config: names the seed of the split.
        windows: the corpus in its order, [N, ...].
        held: samples of each part but "train".
        what: source of the windows, for an error.

    Raises:
        DataError: there are too few windows for the requested sizes.
    """
    rest = len(windows) - sum(held.values())
    if rest < 2:
        raise DataError(
            f"data={config.kind}: {what} gives {len(windows)} samples of {windows.shape[1]} bytes, but the parts "
            f"{held} leave {rest} for training; make them or data.block smaller, or bring more text"
        )
    probe = hashed_order(len(windows), "probe", config.split_seed)[: held["probe"]]
    stretches = hashed_order(-(-len(windows) // STRETCH), "split", config.split_seed)
    places = (stretches[:, None] * STRETCH + torch.arange(STRETCH)).flatten()
    free = torch.ones(len(stretches) * STRETCH, dtype=torch.bool)
    free[len(windows) :] = False
    free[probe] = False
    sizes = {**{name: size for name, size in held.items() if name != "probe"}, "train": rest}
    rows = dict(zip(sizes, places[free[places]].split([*sizes.values()]), strict=True))
    return {name: windows[index] for name, index in (rows | {"probe": probe}).items()}


def standard_library(root: Path, max_bytes: int) -> tuple[bytes, list[dict[str, Any]]]:
    """Reads the first ``max_bytes`` of the library's modules in the order of their paths; also lists the files read.

    Tests, generated build settings and installed packages are left out.
    """
    paths = []
    for folder, names, files in os.walk(root):
        names[:] = [name for name in names if name.isidentifier() and name not in ("__pycache__", "test", "tests")]
        paths += [
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    corpus, record, left = [], [], max_bytes
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        if left == 0:
            break
        try:
            data = path.read_bytes()[:left]
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); repair this Python's standard library"
            ) from error
        corpus.append(data)
        record.append({"path": name, "bytes": len(data)})
        left -= len(data)
    return b"".join(corpus), record


@register(PySourceConfig)
def load_pysource(config: PySourceConfig) -> Bundle:
    """Reads the standard library; x and y are int64 [N, block]."""
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus, files = standard_library(root, config.max_bytes)
    if not files:
        raise DataError(
            f"{root}: no .py files; expected this Python's standard library as source; use data=text instead"
        )
    held = {"test": config.test, "validation": config.validation, "probe": config.probe}
    dealt = deal(config, cut_windows(corpus, config.block), held, str(root))
    record = {"files": files, "xxh3_64": xxhash.xxh3_64(corpus).hexdigest(), "python": platform.python_version()}
    return _bundle(config, config.block, dealt, record)


@register(TextConfig)
def load_text(config: TextConfig) -> Bundle:
    """Reads both files; x and y are int64 [N, block]."""
    layout = "train.txt and test.txt (plain text, read as bytes)"
    fix = "mkdir -p FOLDER && cp TRAINING_TEXT FOLDER/train.txt && cp TEST_TEXT FOLDER/test.txt"
    root = data_root(config, config.root, "wikitext2", layout, fix)
    texts, files = {}, []
    for name in ("train", "test"):
        path = data_file(root, f"{name}.txt", layout, fix)
        try:
            texts[name] = path.read_bytes()[: config.max_bytes]
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); expected {layout}; chmod +r {path}") from error
        digest = xxhash.xxh3_64(texts[name]).hexdigest()
        files.append({"path": path.name, "bytes": len(texts[name]), "xxh3_64": digest})
    test = cut_windows(texts["test"], config.block)
    if len(test) < 2:
        raise DataError(
            f"{root / 'test.txt'}: {len(texts['test'])} bytes give {len(test)} samples of data.block + 1 = "
            f"{config.block + 1} bytes, expected at least 2; bring more text"
        )
    held = {"validation": config.validation, "probe": config.probe}
    dealt = deal(config, cut_windows(texts["train"], config.block), held, str(root / "train.txt"))
    return _bundle(config, config.block, {**dealt, "test": test}, {"files": files})


def _bundle(config: DataConfig, block: int, windows: dict[str, Tensor], record: dict[str, Any]) -> Bundle:
    return make_bundle(
        name=config.kind,
        task=Task.LANGUAGE,
        input_shape=(block,),
        classes=VOCABULARY,
        parts={name: BytePart(part) for name, part in windows.items()},
        record=record,
    )
