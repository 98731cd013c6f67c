"""Files that are written whole or not at all, and the names of the files in a run directory.

A file that others read is written under a temporary name, synced and renamed. Then its folder is synced, since a power
failure can undo a rename that is not on the disk yet. So readers see either the old file or the new one, never a part
of it, even after a crash.
"""

import contextlib
import errno
import hashlib
import importlib.resources
import json
import os
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO


def package_folder() -> Path:
    """Returns the folder of esper's own sources."""
    return Path(str(importlib.resources.files("esper"))).resolve()


# What a file system answers that does not know a call at all; any other error is a disk in trouble.
NO_SUCH_CALL = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
NO_LOCKS = (*NO_SUCH_CALL, errno.ENOLCK)
NO_MODES = (*NO_SUCH_CALL, errno.EPERM)
_said: set[str] = set()  # what this process has passed over


def _pass_over(what: str) -> None:
    if what not in _said:
        _said.add(what)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stderr.write(f"esper: {what}\n")
            sys.stderr.flush()


def sync(path: Path) -> None:
    """Waits until a file or a folder is on the disk.

    Some file systems cannot sync a folder (CIFS, sshfs, other FUSE ones). That is said once and passed over: a rename
    may then be lost with the power, as it may be with any other program there.

    Raises:
        OSError: the disk refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SUCH_CALL or not path.is_dir():
            raise
        _pass_over(f"{path}: folders cannot be synced there ({error.strerror}); a loss of power may undo the last save")
    finally:
        os.close(handle)


class Hashed:
    """Hashes what goes into a file on its way, so that it need not be read again.

    Fields:
        bytes: written so far.
    """

    def __init__(self) -> None:
        self.bytes, self._hash = 0, hashlib.sha256()

    def onto(self, file: BinaryIO) -> "Hashed":
        """Writes into this file from now on."""
        self._file = file
        return self

    def write(self, data: Any) -> int:
        """Writes bytes."""
        self._hash.update(data)
        self.bytes += memoryview(data).nbytes
        return self._file.write(data)

    def flush(self) -> None:
        """Flushes the file."""
        self._file.flush()

    @property
    def sha256(self) -> str:
        """Of what was written."""
        return self._hash.hexdigest()


def write_synced(path: Path, content: bytes | str | Callable[[BinaryIO], Any], *, mode: int = 0o666) -> None:
    """Writes a file in place and waits until its content is on the disk; for files in a folder that is renamed later.

    Args:
        path: path of the file.
        content: bytes, text, or a function that writes into the open file.
        mode: permission bits of a new file, of which the umask takes some away.

    Raises:
        OSError: the disk refuses; a part of the file may be left.
    """
    with open(path, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
        if callable(content):
            content(file)
        else:
            file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())


def write_whole(path: Path, content: bytes | str | Callable[[BinaryIO], Any], *, mode: int = 0o666) -> None:
    """Writes a file so that readers, even after a crash, see the old one or the new one; syncs file and folder.

    Args:
        path: path of the file; its folder must exist.
        content: bytes, text, or a function that writes into the open file.
        mode: permission bits, of which the umask takes some away.

    Raises:
        OSError: the disk refuses; the old file is unchanged, and no temporary file is left beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write_synced(temporary, content, mode=mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def append_synced(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Appends to a file, which is made if it is not there, and waits until all of it is on the disk.

    Raises:
        OSError: the disk refuses; the file is as long as before, where it can still be cut.
    """
    handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)
    try:
        end, rest = os.fstat(handle).st_size, memoryview(data)
        try:
            while rest:
                rest = rest[os.write(handle, rest) :]
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, end)
            raise
    finally:
        os.close(handle)
    if end == 0:
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON with sorted keys by `write_whole`."""
    write_whole(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


@dataclass(frozen=True, slots=True)
class RunDir:
    """The paths in a run directory, RUN. Nothing is read or created."""

    path: Path
    """RUN itself."""

    @property
    def config(self) -> Path:
        """Every setting, resolved, read-only; the workers read this file."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, machine, git state and command line of the last start, with those of earlier starts inside."""
        return self.path / "environment.json"

    @property
    def lock(self) -> Path:
        """The lock that the launcher and its torchrun hold while they live."""
        return self.path / "lock"

    @property
    def status(self) -> Path:
        """The end of the last attempt: its status and reason."""
        return self.path / "STATUS.json"

    @property
    def result(self) -> Path:
        """The result of a finished run."""
        return self.path / "result.json"

    def earlier_result(self, step: int) -> Path:
        """The result that the run had at ``step``, before it was made longer."""
        return self.path / f"result-{step:08d}.json"

    @property
    def data(self) -> Path:
        """The data that the run trains on: digest, and files with their hashes. Other data is refused."""
        return self.path / "data.json"

    @property
    def origin(self) -> Path:
        """What a run that goes on from another one began with, and what that had cost."""
        return self.path / "origin.json"

    @property
    def order(self) -> Path:
        """A person's latest order to the breaker of growth; the next resume obeys it."""
        return self.path / "breaker.json"

    @property
    def orders(self) -> Path:
        """The folder of people's orders; see `esper.leyline.orders.folder`."""
        return self.path / "orders"

    @property
    def attempt(self) -> Path:
        """The lease on RUN: number, token and launch of the newest attempt."""
        return self.path / "attempt.json"

    @property
    def saved(self) -> Path:
        """The mark that the run has saved; written with its first checkpoint, outside of their folder."""
        return self.path / "saved.json"

    @property
    def health(self) -> Path:
        """What each rank measured of itself in the last interval: times and memory, a small file each."""
        return self.path / "health"

    @property
    def events(self) -> Path:
        """Rank 0's events, one JSON object per line."""
        return self.path / "events.jsonl"

    def rank_events(self, rank: int) -> Path:
        """The faults of another rank than 0."""
        return self.path / f"events-rank-{rank:05d}.jsonl"

    @property
    def parquet(self) -> Path:
        """All events of a run that is done, compacted for queries."""
        return self.path / "events.parquet"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def heartbeat(self) -> Path:
        """The folder of heartbeats: where each rank was last."""
        return self.path / "heartbeat"

    @property
    def library(self) -> Path:
        """The folder of the seed library, unless ``library.root`` names another."""
        return self.path / "library"

    def export(self, step: int) -> Path:
        """The default folder for an export of the checkpoint at ``step``."""
        return self.path / f"export-{step:08d}"
