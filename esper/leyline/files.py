"""Files: written whole or not at all, and the names that a run directory holds.

A file that others read is written under a temporary name, synced and renamed; then its folder is synced, since a rename
that is not on the disk can be lost with the power. So a reader sees the old file or the new one, and after a crash one
of the two, never a part.
"""

import importlib.resources
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


def package_folder() -> Path:
    """The folder of esper's own sources, wherever it is asked from."""
    return Path(str(importlib.resources.files("esper"))).resolve()


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk.

    Raises:
        OSError: the disk says no.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_synced(path: Path, content: bytes | str | Callable[[BinaryIO], Any]) -> None:
    """Writes a file in place and waits until its content is on the disk; for files of a folder that is renamed later.

    Args:
        path: of the file.
        content: bytes, text, or a function that writes into the open file.

    Raises:
        OSError: the disk says no; a part may stand there.
    """
    with path.open("wb") as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, content: bytes | str | Callable[[BinaryIO], Any], *, mode: int | None = None) -> None:
    """Writes a file so that a reader, and a crash, leaves the old one or the new one; file and folder are synced.

    Args:
        path: of the file; its folder is there.
        content: bytes, text, or a function that writes into the open file.
        mode: permission bits; None: those of a new file.

    Raises:
        OSError: the disk says no; what was there stands as it was, and nothing lies beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write_synced(temporary, content)
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_whole` of JSON with sorted keys."""
    write_whole(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True, slots=True)
class RunDir:
    """The names in a run directory, RUN. Nothing is read or made."""

    path: Path
    """RUN itself."""

    @property
    def config(self) -> Path:
        """Every setting, resolved, read-only; what the workers read."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, machine, git state and command line of the last start; earlier ones inside."""
        return self.path / "environment.json"

    @property
    def lock(self) -> Path:
        """Held by the launcher and its torchrun while they live."""
        return self.path / "lock"

    @property
    def status(self) -> Path:
        """How the last attempt ended."""
        return self.path / "STATUS.json"

    @property
    def result(self) -> Path:
        """The result of a finished run."""
        return self.path / "result.json"

    @property
    def data(self) -> Path:
        """The data that the run trains on: digest, files with hashes; others are refused."""
        return self.path / "data.json"

    @property
    def order(self) -> Path:
        """A person's latest order to the breaker of growth, obeyed by the resume after it."""
        return self.path / "breaker.json"

    @property
    def attempt(self) -> Path:
        """Number, token and launch of the newest attempt: the lease on RUN."""
        return self.path / "attempt.json"

    @property
    def events(self) -> Path:
        """Rank 0's events, one JSON line each."""
        return self.path / "events.jsonl"

    def rank_events(self, rank: int) -> Path:
        """Faults of another rank."""
        return self.path / f"events-rank-{rank:05d}.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def heartbeat(self) -> Path:
        """The folder of the ranks' marks: where each was last."""
        return self.path / "heartbeat"

    @property
    def library(self) -> Path:
        """The folder of the seed library, where ``library.root`` names no other."""
        return self.path / "library"

    def export(self, step: int) -> Path:
        """Where an export of a checkpoint goes when nothing else is said."""
        return self.path / f"export-{step:08d}"
