"""Stores seeds on disk, addressed by their content.

    ROOT/seeds/SHA256.safetensors    tensors by name; the name is the SHA-256 of the whole file
    ROOT/index/BIRTH.json            birth, content, bytes, torch: which content a birth has

A file is written under a temporary name, synced and renamed, so that ranks and runs may share a library: a second
writer writes the same bytes. Content is verified whenever it is read. Nothing is ever unpickled.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from esper.kasmina.births.key import Birth
from esper.leyline.errors import EsperError
from esper.leyline.files import write_whole
from esper.leyline.plain import from_plain, to_plain

FORMAT = 1


class MissingEntry(EsperError):
    """The library lacks an entry that must be there; the text names the file."""

    exit_code = 74


class DamagedEntry(EsperError):
    """An entry does not match its own record; the text names the file."""

    exit_code = 74


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """One line of the index.

    Fields:
        format: format of this file.
        birth: the birth that made the content.
        content: SHA-256 of the tensor file.
        bytes: size of the tensor file.
        torch: version of torch that built it, for information.
    """

    format: int
    birth: Birth
    content: str
    bytes: int
    torch: str


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)


class SeedStore:
    """The files of one library.

    Args:
        root: the library's folder; made when something is first written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def index_path(self, birth: Birth) -> Path:
        """Returns the path of the index file that names the content of a birth."""
        return self.root / "index" / f"{birth.id}.json"

    def content_path(self, content: str) -> Path:
        """Returns the path of the tensor file with this SHA-256."""
        return self.root / "seeds" / f"{content}.safetensors"

    def save(self, birth: Birth, tensors: Mapping[str, Tensor]) -> str:
        """Writes an entry; returns the SHA-256 of its content.

        Args:
            birth: the birth that made the tensors.
            tensors: by state-dict name; contiguous, sharing no memory, on CPU.

        Raises:
            OSError: the disk refuses; files that were there before are whole.
        """
        data = safetensors.torch.save(dict(tensors), metadata={"esper": f"seed {FORMAT}"})
        content = hashlib.sha256(data).hexdigest()
        _write(self.content_path(content), data)
        entry = IndexEntry(format=FORMAT, birth=birth, content=content, bytes=len(data), torch=torch.__version__)
        _write(self.index_path(birth), json.dumps(to_plain(entry), indent=1).encode())
        return content

    def load(self, birth: Birth) -> dict[str, Tensor] | None:
        """Reads the verified tensors of a birth; None if the index does not know it.

        Raises:
            MissingEntry: the index names a content that is not there.
            DamagedEntry: the entry cannot be read, or does not match its own record.
        """
        path = self.index_path(birth)
        try:
            text = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise DamagedEntry(f"{path}: cannot be read ({error.strerror})") from error
        try:
            entry = from_plain(IndexEntry, json.loads(text))
        except ValueError as error:
            raise DamagedEntry(f"{path}: no readable index entry ({error}); remove it to have the seed built") from None
        if entry.format != FORMAT or entry.birth != birth:
            raise DamagedEntry(f"{path}: format {entry.format} of {entry.birth}; need {FORMAT} of {birth}")
        return self._read_content(entry)

    def _read_content(self, entry: IndexEntry) -> dict[str, Tensor]:
        path = self.content_path(entry.content)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise MissingEntry(f"{path}: the index names it and it is not there; restore it from a copy") from None
        except OSError as error:
            raise DamagedEntry(f"{path}: cannot be read ({error.strerror})") from error
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry.content:
            raise DamagedEntry(
                f"{path}: SHA-256 is {digest[:12]}..., {len(data)} bytes; the file is damaged: restore it from a copy"
            )
        try:
            return safetensors.torch.load(data)
        except Exception as error:
            raise DamagedEntry(f"{path}: no safetensors file ({type(error).__name__}: {error})") from error
