"""Windows of bytes, cut from a corpus or from each of its documents."""

import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def cut_windows(corpus: bytes | Tensor, block: int) -> Tensor:
    """Cuts a corpus into windows, uint8 [N, block + 1]; the rest at the end that fills no window is left out.

    Windows of a tensor of bytes are a view of it.
    """
    count = len(corpus) // (block + 1)
    if isinstance(corpus, Tensor):
        return corpus[: count * (block + 1)].view(count, block + 1)
    return torch.from_numpy(np.frombuffer(corpus, np.uint8, count * (block + 1)).copy()).view(count, block + 1)


def map_text(path: Path, most: int | None) -> Tensor:
    """The first bytes of a file as uint8 [N], in memory that all processes of a machine share.

    The kernel reads what is used, when it is used, and may let go of it again. The file must stay as it is: a process
    that reads beyond the end of one that was cut dies.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
    size = size if most is None else min(size, most)
    return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)


def map_windows(path: Path, most: int | None, block: int) -> Tensor:
    """Windows of the first bytes of a file, uint8 [N, block + 1]; see `map_text`."""
    return cut_windows(map_text(path, most), block)


def cut_documents(documents: Sequence[bytes], block: int) -> tuple[Tensor, Tensor]:
    """Cuts each document into windows: uint8 [N, block + 1], and the number of each window's document, int64 [N]."""
    cut = [cut_windows(document, block) for document in documents]
    sizes = torch.tensor([len(one) for one in cut], dtype=torch.int64)
    numbers = torch.repeat_interleave(torch.arange(len(cut)), sizes)
    return torch.cat([torch.empty(0, block + 1, dtype=torch.uint8), *cut]), numbers


def find_documents(text: bytes, start: str) -> list[bytes]:
    """Cuts a text before each match of ``start``; what comes before the first match is a document too."""
    places = [match.start() for match in re.finditer(start.encode(), text, re.MULTILINE)]
    bounds = sorted({0, *places, len(text)})
    return [text[first:last] for first, last in itertools.pairwise(bounds)]
