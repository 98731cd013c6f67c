"""Loads the data sets of two phases: digits by class, and text of two languages."""

import platform
import sysconfig
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from esper.leyline.errors import DataError
from esper.tolaria.data.corpus import VOCABULARY, deal, standard_library
from esper.tolaria.data.digits import read_digits
from esper.tolaria.data.hashing import split_order
from esper.tolaria.data.images import channel_statistics
from esper.tolaria.data.parts import Bundle, BytePart, ImagePart, make_bundle
from esper.tolaria.data.phases.config import DigitsPhasesConfig, TextPhasesConfig
from esper.tolaria.data.phases.dealing import PhasePart, Rows, merge_phases
from esper.tolaria.data.task import Task
from esper.tolaria.data.windows import cut_windows


def load_digits_phases(config: DigitsPhasesConfig, learned: Mapping[str, Any] | None = None) -> Bundle:
    """Reads the digits; x is float32 [N, 1, 8, 8], normalised by the old training part in both phases."""
    images, labels = read_digits()
    dealt: list[Rows] = []
    for what, is_in in (("old", labels < config.old_classes), ("new", labels >= config.old_classes)):
        rows = is_in.nonzero().flatten()
        held = {"test": config.test, "validation": config.validation, "probe": config.probe}
        order = split_order(config, len(rows), sum(held.values()), f"the {what} phase of digits")
        sizes = [*held.values(), len(rows) - sum(held.values())]
        dealt.append(dict(zip((*held, "train"), (rows[part] for part in order.split(sizes)), strict=True)))
    learned = learned or channel_statistics(images[dealt[0]["train"]], config.kind)
    merged = merge_phases(config, *dealt)
    return make_bundle(
        name=config.kind,
        task=Task.CLASSIFICATION,
        input_shape=(1, 8, 8),
        classes=10,
        parts={
            name: PhasePart(ImagePart(images[rows], labels[rows], **learned), new)
            for name, (rows, new) in merged.items()
        },
        record={"files": [], "learned": learned, "phase": config.phase.value},
        refills=False,  # training samples are not drawn as those of the probe
        phased=True,
    )


def torch_headers(max_bytes: int) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Reads the first ``max_bytes`` of the C++ headers that torch ships, by their paths; also lists the files read.

    Raises:
        DataError: there are none, or one cannot be read.
    """
    spec = find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    root = Path(spec.origin).parent / "include"
    texts, record, left = [], [], max_bytes
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.h")):
        if left == 0:
            break
        try:
            with path.open("rb") as file:
                data = file.read(left)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); install torch anew") from error
        texts.append(data)
        record.append({"path": name, "bytes": len(data)})
        left -= len(data)
    if not texts:
        raise DataError(f"{root}: no C++ headers (.h); expected those that torch ships; install torch from a wheel")
    return texts, record


def load_text_phases(config: TextPhasesConfig) -> Bundle:
    """Reads both corpora; x and y are int64 [N, block]. Windows are dealt as `esper.tolaria.data.corpus` says."""
    library = Path(sysconfig.get_paths()["stdlib"])
    corpora = {"old": standard_library(library, config.max_bytes), "new": torch_headers(config.max_bytes)}
    windows: list[Tensor] = []
    dealt: list[Rows] = []
    files: dict[str, Any] = {}
    for what, (texts, listed) in corpora.items():
        corpus = b"".join(texts)
        cut = cut_windows(corpus, config.block)
        held = {"test": config.test, "validation": config.validation, "probe": config.probe}
        first = sum(len(earlier) for earlier in windows)
        rows = deal(config, cut, held, f"the {what} phase")
        dealt.append({name: part + first for name, part in rows.items()})
        windows.append(cut)
        files[what] = {"files": listed, "xxh3_64": xxhash.xxh3_64(corpus).hexdigest()}
    both = torch.cat(windows)
    record = {**files, "python": platform.python_version(), "torch": torch.__version__, "phase": config.phase.value}
    return make_bundle(
        name=config.kind,
        task=Task.LANGUAGE,
        input_shape=(config.block,),
        classes=VOCABULARY,
        parts={
            name: PhasePart(BytePart(both, rows), new) for name, (rows, new) in merge_phases(config, *dealt).items()
        },
        record=record,
        refills=False,
        phased=True,
    )
