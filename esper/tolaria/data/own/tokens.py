"""Files of tokens: raw uint16 or uint32, in several shards, mapped into memory, so that a corpus may be larger than it.

A sample is a window of ``block`` + 1 tokens, cut from its shard without overlap: x is the window without its last
token, y without its first. Windows are dealt as those of text are (`esper.tolaria.data.corpus`): probe windows singly,
the others in stretches of 32 neighbours. Where ``document_end`` names a token, a window belongs to the document in
which it begins, and evidence counts documents.

What a process holds of its own are permutations of windows (about 60 bytes a window, with that of an epoch); pages of
the files are the system's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from esper.leyline.errors import DataError
from esper.tolaria.data.configs import TokensConfig
from esper.tolaria.data.hashing import seeded_order
from esper.tolaria.data.parts import PART_NAMES, Bundle, Part, make_bundle
from esper.tolaria.data.registry import data_root
from esper.tolaria.data.task import Task

STRETCH = 32  # neighbouring windows that are dealt together
LOOKED_AT = 1 << 16  # bytes at each end of a shard that the digest reads
SUFFIX = ".bin"


def kind_of(bits: int) -> np.dtype[Any]:
    """The numbers of a file of tokens, little-endian."""
    return np.dtype("<u2" if bits == 16 else "<u4")


class Shards:
    """Windows of several files, numbered through.

    Args:
        paths: of the files, in their order.
        config: says what a token and a window is.
    """

    def __init__(self, paths: list[Path], config: TokensConfig) -> None:
        self.paths, self.width, self.vocabulary = paths, config.block + 1, config.vocabulary
        self.bits, self.maps = config.bits, self._map(config.bits)
        counts = torch.tensor([len(one) // self.width for one in self.maps])
        self.starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])

    def _map(self, bits: int) -> list[Any]:
        maps: list[Any] = []
        for path in self.paths:
            size = path.stat().st_size
            if size % (bits // 8):
                raise DataError(f"{path}: {size} bytes are no whole number of {bits}-bit tokens; set data.bits")
            maps.append(np.memmap(path, kind_of(bits), "r") if size else np.empty(0, kind_of(bits)))
        return maps

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "maps": None}  # another process maps the files itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.maps = self._map(self.bits)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, windows: Tensor) -> Tensor:
        """Windows by number, int64 [N, block + 1].

        Raises:
            DataError: a token is none of the vocabulary.
        """
        shard = torch.searchsorted(self.starts, windows, right=True) - 1
        out = np.empty((len(windows), self.width), dtype=np.int64)
        for place, (which, window) in enumerate(zip(shard.tolist(), windows.tolist(), strict=True)):
            first = (window - int(self.starts[which])) * self.width
            out[place] = self.maps[which][first : first + self.width]
        if len(out) and int(out.max()) >= self.vocabulary:
            row = int(out.max(1).argmax())
            raise DataError(
                f"{self.paths[int(shard[row])]}: window {int(windows[row])} has token {int(out[row].max())}, expected "
                f"0 to {self.vocabulary - 1}; set data.vocabulary, or data.bits"
            )
        return torch.from_numpy(out)

    def documents(self, windows: Tensor, end: int) -> Tensor:
        """Number of the document in which each window begins, int64; a shard begins a new one."""
        found = torch.empty_like(windows)
        shard = torch.searchsorted(self.starts, windows, right=True) - 1
        before = 0
        for which, tokens in enumerate(self.maps):
            ends = np.flatnonzero(tokens == end)
            mine = shard == which
            firsts = (windows[mine] - self.starts[which]) * self.width
            found[mine] = before + torch.from_numpy(np.searchsorted(ends, firsts.numpy(), side="left"))
            before += len(ends) + 1
        return found

    def digest_into(self, hasher: Any) -> None:
        """Names, sizes, and both ends of every file."""
        for path in self.paths:
            size = path.stat().st_size
            with path.open("rb") as file:
                hasher.update(f"{path.name} {size};".encode() + file.read(LOOKED_AT))
                file.seek(max(0, size - LOOKED_AT))
                hasher.update(file.read(LOOKED_AT))


class TokenPart(Part):
    """Windows of shards.

    Args:
        shards: the files.
        windows: which of their windows, int64 [N].
    """

    def __init__(self, shards: Shards, windows: Tensor) -> None:
        self._shards, self._windows = shards, windows

    def __len__(self) -> int:
        return len(self._windows)

    def fetch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See `Part.fetch`; x and y are int64 [N, block]."""
        tokens = self._shards.read(self._windows[indices])
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def content(self) -> tuple[Tensor, ...]:
        """Numbers of the windows; the files have a digest of their own."""
        return (self._windows,)


def _deal(config: TokensConfig, size: int, held: dict[str, int], what: str) -> dict[str, Tensor]:
    """Windows of each part: those of the probe drawn singly, the others in stretches."""
    rest = size - sum(held.values())
    if rest < 2:
        raise DataError(f"data=tokens: {what} gives {size} windows, but the parts {held} leave {rest} for training")
    probe = seeded_order(size, "tokens", "probe", config.split_seed)[: held["probe"]]
    order = seeded_order(-(-size // STRETCH), "tokens", "split", config.split_seed)
    others = {name: count for name, count in held.items() if name != "probe"}
    taken, dealt, place = torch.zeros(size, dtype=torch.bool), {"probe": probe}, 0
    taken[probe] = True
    for name, count in others.items():
        rows: list[int] = []
        while len(rows) < count:
            first = int(order[place]) * STRETCH
            place += 1
            rows += [row for row in range(first, min(first + STRETCH, size)) if not taken[row]]
        dealt[name] = torch.tensor(rows[:count])
        taken[dealt[name]] = True
    dealt["train"] = (~taken).nonzero().flatten()
    return dealt


def load_tokens(config: TokensConfig) -> Bundle:
    """Maps the shards; x and y are int64 [N, block].

    Raises:
        DataError: there is no file, one is no file of such tokens, or there are too few windows.
    """
    layout = "a folder train of .bin files (raw tokens), and perhaps one test"
    fix = "mkdir -p FOLDER/train && cp TOKENS FOLDER/train/0.bin"
    root = data_root(config, config.root, "tokens", layout, fix)
    shards: dict[str, Shards] = {}
    for name in ("train", "test"):
        paths = sorted((root / name).glob(f"*{SUFFIX}"))
        if paths:
            shards[name] = Shards(paths, config)
        elif name == "train":
            raise DataError(f"{root / name}: no .bin file in it; expected {layout}; to fill it: {fix}")
    held = {"validation": config.validation, "probe": config.probe}
    held |= {} if "test" in shards else {"test": config.test}
    rows = _deal(config, len(shards["train"]), held, str(root / "train"))
    parts: dict[str, Part] = {name: TokenPart(shards["train"], windows) for name, windows in rows.items()}
    if "test" in shards:
        parts["test"] = TokenPart(shards["test"], torch.arange(len(shards["test"])))
    clusters = None
    if config.document_end is not None:
        clusters = shards["train"].documents(rows["probe"], config.document_end)
    hasher = xxhash.xxh3_64()
    for part in shards.values():
        part.digest_into(hasher)
    for name in PART_NAMES:
        hasher.update(parts[name].content()[0].numpy().data)
    files = [{"path": str(p.relative_to(root)), "bytes": p.stat().st_size} for s in shards.values() for p in s.paths]
    return make_bundle(
        name=config.kind,
        task=Task.LANGUAGE,
        input_shape=(config.block,),
        classes=config.vocabulary,
        parts=parts,
        record={"files": files},
        probe_clusters=clusters,
        refills=config.document_end is None,
        digest=hasher.intdigest() >> 2,
    )
