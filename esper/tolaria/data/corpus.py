"""Text as bytes: windows of ``block`` + 1 bytes that do not overlap, 256 classes, no tokenizer to ship.

Where parts are cut from one corpus, windows are dealt in *stretches* of 32 neighbours, so that the parts are pieces
of text rather than sentences torn apart between training and test. The probe part alone is dealt window by window:
what a seed does to one window it tends to do to the next (paired differences within a stretch correlate by 0.1 to 0.4),
so a probe of 1,024 windows in 32 stretches would say little more than 32 samples do. No byte is in two parts.

Under ``cluster=document`` a document is dealt whole, no window spans two of them, and evidence counts documents.
"""

import os
import platform
import sysconfig
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import xxhash
from torch import Tensor

from esper.leyline.errors import DataError
from esper.tolaria.data.clusters import deal_whole
from esper.tolaria.data.configs import PySourceConfig, TextCluster, TextConfig
from esper.tolaria.data.hashing import hashed_order
from esper.tolaria.data.parts import Bundle, BytePart, make_bundle
from esper.tolaria.data.registry import DataConfig, data_file, data_root
from esper.tolaria.data.task import Task
from esper.tolaria.data.windows import cut_documents, cut_windows, find_documents, map_text, map_windows

STRETCH = 32  # neighbouring windows that are dealt together
VOCABULARY = 256
LARGE = 2**24  # bytes of a file from which on it is mapped into memory rather than read


def deal(config: DataConfig, windows: Tensor, held: dict[str, int], what: str) -> dict[str, Tensor]:
    """Deals windows to the ``held`` parts, and the rest to "train": those of "probe" singly, the others in stretches.

    Returns the rows of each part, int64.

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
    return rows | {"probe": probe}


def standard_library(root: Path, max_bytes: int) -> tuple[list[bytes], list[dict[str, Any]]]:
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
            with path.open("rb") as file:
                data = file.read(left)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read ({error.strerror}); repair this Python's standard library"
            ) from error
        corpus.append(data)
        record.append({"path": name, "bytes": len(data)})
        left -= len(data)
    return corpus, record


def load_pysource(config: PySourceConfig) -> Bundle:
    """Reads the standard library; x and y are int64 [N, block]."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources, files = standard_library(root, config.max_bytes)
    if not files:
        raise DataError(
            f"{root}: no .py files; expected this Python's standard library as source; use data=text instead"
        )
    held = {"test": config.test, "validation": config.validation, "probe": config.probe}
    corpus = b"".join(sources)
    record = {"files": files, "xxh3_64": xxhash.xxh3_64(corpus).hexdigest(), "python": platform.python_version()}
    documents = sources if config.cluster is TextCluster.DOCUMENT else None
    return _bundle(config, _deal(config, corpus, documents, held, str(root)), record)


def load_text(config: TextConfig) -> Bundle:
    """Reads both files, or both folders; x and y are int64 [N, block]."""
    layout = "train.txt and test.txt (plain text, read as bytes), or folders train and test of such files"
    fix = "mkdir -p FOLDER && cp TRAINING_TEXT FOLDER/train.txt && cp TEST_TEXT FOLDER/test.txt"
    root = data_root(config, config.root, "wikitext2", layout, fix)
    texts: dict[str, list[bytes]] = {}
    mapped: dict[str, Tensor] = {}
    again: dict[str, Callable[[], Tensor]] = {}  # for another process
    files: list[dict[str, Any]] = []
    for name in ("train", "test"):
        folder = root / name
        paths = sorted(folder.rglob("*.txt")) if folder.is_dir() else [data_file(root, f"{name}.txt", layout, fix)]
        if not paths:
            raise DataError(f"{folder}: no .txt file in it; expected {layout} in {root}")
        texts[name], left = [], config.max_bytes
        whole = len(paths) == 1 and (name == "test" or config.cluster is TextCluster.WINDOW)
        for path in paths:
            try:
                if whole and path.stat().st_size >= LARGE:
                    mapped[name] = map_text(path, left)
                    again[name] = partial(map_windows, path.absolute(), left, config.block)
                    text = b""
                else:
                    with path.open("rb") as file:
                        text = file.read(left)
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be read ({error.strerror}); expected {layout}; chmod +r {path}"
                ) from error
            left = None if left is None else left - len(text)
            texts[name].append(text)
            content: Any = mapped[name].numpy().data if name in mapped else text
            digest = xxhash.xxh3_64(content).hexdigest()
            files.append({"path": path.relative_to(root).as_posix(), "bytes": len(content), "xxh3_64": digest})
    source = root / "train" if len(texts["train"]) > 1 else root / "train.txt"
    corpora = {name: mapped[name] if name in mapped else b"".join(texts[name]) for name in texts}
    test, length = cut_windows(corpora["test"], config.block), len(corpora["test"])
    if len(test) < 2:
        raise DataError(
            f"{root / 'test.txt'}: {length} bytes give {len(test)} samples of data.block + 1 = "
            f"{config.block + 1} bytes, expected at least 2; bring more text"
        )
    held = {"validation": config.validation, "probe": config.probe}
    documents = None
    if config.cluster is TextCluster.DOCUMENT:
        documents = texts["train"]
        if config.document_start is not None:
            documents = [one for text in documents for one in find_documents(text, config.document_start)]
        if len(documents) < 2:
            raise DataError(
                f"{source}: data.cluster=document, but it is a single document; set data.document_start to what "
                "matches where one begins, or give a folder train with a file for each"
            )
    dealt = _deal(config, corpora["train"], documents, held, str(source))
    return _bundle(config, dealt, {"files": files}, test=test, again=again)


@dataclass(frozen=True, slots=True)
class _Dealt:
    """Windows, those of each part by number, and the document of each where documents are clusters."""

    windows: Tensor
    rows: dict[str, Tensor]
    documents: dict[str, Tensor] | None = None


def _deal(
    config: PySourceConfig | TextConfig,
    corpus: bytes | Tensor,
    documents: list[bytes] | None,
    held: dict[str, int],
    what: str,
) -> _Dealt:
    if documents is None:
        windows = cut_windows(corpus, config.block)
        return _Dealt(windows, deal(config, windows, held, what))
    windows, numbers = cut_documents(documents, config.block)
    rows = deal_whole(numbers, held, config.split_seed, f"data={config.kind}: {what}")
    return _Dealt(windows, rows, {name: numbers[row] for name, row in rows.items()})


def _bundle(
    config: PySourceConfig | TextConfig,
    dealt: _Dealt,
    record: dict[str, Any],
    *,
    test: Tensor | None = None,
    again: Mapping[str, Callable[[], Tensor]] = MappingProxyType({}),
) -> Bundle:
    parts = {name: BytePart(dealt.windows, rows, again.get("train")) for name, rows in dealt.rows.items()}
    if test is not None:
        parts["test"] = BytePart(test, again=again.get("test"))
    labels = dealt.documents or {}
    return make_bundle(
        name=config.kind,
        task=Task.LANGUAGE,
        input_shape=(config.block,),
        classes=VOCABULARY,
        parts=parts,
        record=record,
        probe_clusters=labels.get("probe"),
        train_clusters=labels.get("train"),
    )
