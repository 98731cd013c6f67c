"""Seeds on disk, addressed by their content.

    ROOT/seeds/SHA256.safetensors    tensors by name; the name is the SHA-256 of the whole file
    ROOT/index/BIRTH.json            birth, content, bytes, torch: which content a birth has

A file is written under a temporary name, synced and renamed, so that ranks and runs may share a library: who comes
second writes the same bytes. Content is verified whenever it is read. Nothing is ever unpickled.
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
    """An entry is not what it says; the text names the file."""

    exit_code = 74


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexEntry:
    """One line of the index.

    Fields:
        format: of this file. birth: what the content was born of. content: SHA-256 of the tensor file. bytes: its size.
        torch: version that built it, for information.
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
        root: its folder; made when something is first written.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def index_path(self, birth: Birth) -> Path:
        """Where the index says which content a birth has."""
        return self.root / "index" / f"{birth.id}.json"

    def content_path(self, content: str) -> Path:
        """Where tensors of this SHA-256 lie."""
        return self.root / "seeds" / f"{content}.safetensors"

    def save(self, birth: Birth, tensors: Mapping[str, Tensor]) -> str:
        """Writes an entry; returns the SHA-256 of its content.

        Args:
            birth: what they were born of. tensors: by state-dict name; contiguous, sharing no memory, on CPU.

        Raises:
            OSError: the disk says no; what was there before is whole.
        """
        data = safetensors.torch.save(dict(tensors), metadata={"esper": f"seed {FORMAT}"})
        content = hashlib.sha256(data).hexdigest()
        _write(self.content_path(content), data)
        entry = IndexEntry(format=FORMAT, birth=birth, content=content, bytes=len(data), torch=torch.__version__)
        _write(self.index_path(birth), json.dumps(to_plain(entry), indent=1).encode())
        return content

    def load(self, birth: Birth) -> dict[str, Tensor] | None:
        """The verified tensors of a birth, None where the index does not know it.

        Raises:
            MissingEntry: the index names a content that is not there.
            DamagedEntry: the entry cannot be read, or is not what it says.
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
        return self._content(entry)

    def _content(self, entry: IndexEntry) -> dict[str, Tensor]:
        path = self.content_path(entry.content)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise MissingEntry(f"{path}: the index names it and it is not there; restore it from a copy") from None
        except OSError as error:
            raise DamagedEntry(f"{path}: cannot be read ({error.strerror})") from error
        found = hashlib.sha256(data).hexdigest()
        if found != entry.content:
            raise DamagedEntry(
                f"{path}: SHA-256 is {found[:12]}..., {len(data)} bytes; the file is damaged: restore it from a copy"
            )
        try:
            return safetensors.torch.load(data)
        except Exception as error:
            raise DamagedEntry(f"{path}: no safetensors file ({type(error).__name__}: {error})") from error
