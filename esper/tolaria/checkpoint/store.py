"""Checkpoints on disk: written by all ranks, committed by one, verified by all.

    step-00000100/            a committed checkpoint
      state.pt                rank 0: everything that is equal on all ranks
      rank-00000.pt ...       each rank's own data (its random number state)
      manifest.json           step, tick, score, world size, and size and SHA-256 of every file
    step-00000150.a2.tmp/     being written by attempt 2; never read

A save takes two phases. First every rank writes and fsyncs its file into the temporary folder. Once all have said that
they did, rank 0 hashes the files (its own were hashed while they were written), writes the manifest, fsyncs and
renames. Only complete folders ever have a checkpoint's name, and a checkpoint that is removed loses its name first. So
a process killed at any moment leaves the other checkpoints as they were, and anything wrong in a folder of that name is
damage, to be reported. Files load with plain ``torch.load`` (``weights_only=True``).

RUN/saved.json, beside the folder, says that there has been a checkpoint. A run that has one, but no checkpoint any
more (the folder is empty, or was lost), is not begun anew without a word.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from esper.leyline.errors import CheckpointError
from esper.leyline.files import Hashed, RunDir, sync, write_json, write_synced
from esper.leyline.plain import from_plain, to_plain

FORMAT = 15


def rank_file(rank: int) -> str:
    """Name of one rank's own file."""
    return f"rank-{rank:05d}.pt"


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The manifest of a committed checkpoint.

    Fields:
        format: of the checkpoint's files.
        step: optimizer step.
        tick: control tick.
        world_size: ranks that wrote it.
        score: the objective at that step, higher is better; None if unknown.
        files: size and hash of each file, by name.
    """

    format: int
    step: int
    tick: int
    world_size: int
    score: float | None
    files: dict[str, FileEntry]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CheckpointStore:
    """The checkpoints of one run directory.

    Args:
        folder: ``RUN/checkpoints``.
        attempt: number of this process group's attempt.
        keep: number of newest checkpoints to keep.
        lease: raises if a newer attempt has begun; called before a folder with a checkpoint's name is touched.
    """

    def __init__(self, folder: Path, *, attempt: int, keep: int, lease: Callable[[], None] = lambda: None) -> None:
        self.folder, self.attempt, self.keep, self.lease = folder, attempt, keep, lease
        self._written: dict[tuple[int, str], FileEntry] = {}  # by this process, of saves that are not committed

    @classmethod
    def of_run(cls, run: Path) -> "CheckpointStore":
        """The checkpoints of a run directory, for reading only: without a lease."""
        return cls(RunDir(run).checkpoints, attempt=0, keep=1)

    def path(self, step: int) -> Path:
        """Folder of the committed checkpoint of a step."""
        return self.folder / f"step-{step:08d}"

    def _temporary(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.a{self.attempt}.tmp"

    def _names(self) -> list[str]:
        """Names in the folder; none if it does not exist.

        Raises:
            CheckpointError: the folder cannot be read, which must not look like an empty one.
        """
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be read ({error.strerror})") from None

    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, valid or not, newest first.

        Raises:
            CheckpointError: the folder cannot be read.
        """
        digits = [name.removeprefix("step-") for name in self._names() if name.startswith("step-")]
        return sorted((int(text) for text in digits if text.isdigit()), reverse=True)

    def signs(self) -> list[str]:
        """What shows that the run has saved, a text for each sign; empty for a run that has not. Raises nothing."""
        mark = RunDir(self.folder.parent).saved
        signs = [f"{mark} says that the run has saved"] if mark.exists() else []
        try:
            names, steps = self._names(), self.steps()
        except CheckpointError as error:
            return [str(error), *signs]
        aside = max((name for name in names if name.startswith("aside-")), default=None)
        if steps:
            return [f"step {steps[0]} and {len(steps) - 1} more", *signs]
        if aside is not None:
            text = f"a rollback set {aside} aside and saved nothing after it; renamed to step-... it is one again"
            return [text, *signs]
        return signs

    def clean(self) -> None:
        """Removes what killed attempts left half-written; called on rank 0 before any rank writes."""
        self.lease()
        for entry in self.folder.glob("step-*.tmp") if self.folder.is_dir() else ():
            shutil.rmtree(entry, ignore_errors=True)

    def write(self, step: int, name: str, payload: dict[str, Any]) -> None:
        """Writes and fsyncs one file of a save in progress.

        Raises:
            OSError: the disk refuses.
        """
        folder = self._temporary(step)
        folder.mkdir(parents=True, exist_ok=True)
        import torch  # here, since the launcher looks at checkpoints without it

        written = Hashed()
        write_synced(folder / name, lambda file: torch.save(payload, cast(BinaryIO, written.onto(file))))
        self._written[step, name] = FileEntry(bytes=written.bytes, sha256=written.sha256)

    def commit(self, step: int, *, tick: int, world_size: int, score: float | None) -> int:
        """Turns a complete save into a checkpoint (rank 0), and removes older ones beyond ``keep``; returns its bytes.

        Raises:
            CheckpointError: a rank's file is not there.
            LeaseError: a newer attempt has begun; nothing was touched.
            OSError: the disk refuses; the save stays temporary.
        """
        folder, final = self._temporary(step), self.path(step)
        self.lease()
        files = {}
        for name in ("state.pt", *(rank_file(rank) for rank in range(world_size))):
            path = folder / name
            if not path.exists():
                raise CheckpointError(f"save of step {step}: {path} is not there; is RUN on a shared file system?")
            size, entry = path.stat().st_size, self._written.pop((step, name), None)
            if entry is not None and entry.bytes != size:
                raise CheckpointError(f"save of step {step}: {path} has {size} bytes, {entry.bytes} were written")
            files[name] = entry or FileEntry(bytes=size, sha256=_sha256(path))
        manifest = Manifest(format=FORMAT, step=step, tick=tick, world_size=world_size, score=score, files=files)
        write_synced(folder / "manifest.json", json.dumps(to_plain(manifest), indent=1))
        sync(folder)
        self.lease()  # again, after the hashing: what is left takes no time
        if final.exists():  # an older attempt of the same step that a later one found damaged or replayed
            self._remove(step)
        folder.rename(final)
        sync(self.folder)
        self._mark_saved(step)
        self._retain(step)
        return sum(entry.bytes for entry in files.values())

    def _mark_saved(self, step: int) -> None:
        """Notes once, beside the folder, that the run has saved: without its checkpoints it must not begin anew.

        It comes after the checkpoint, so that a kill in between leaves no mark without one; the next save makes up for
        it, as for a disk that refuses.
        """
        mark = RunDir(self.folder.parent).saved
        if not mark.exists():
            with contextlib.suppress(OSError):
                write_json(mark, {"first_step": step, "attempt": self.attempt})

    def abandon(self, step: int) -> None:
        """Removes a save that some rank could not finish."""
        self._written = {key: entry for key, entry in self._written.items() if key[0] != step}
        shutil.rmtree(self._temporary(step), ignore_errors=True)

    def _remove(self, step: int) -> None:
        path = self.path(step)
        stale = path.with_name(f"{path.name}.{time.time_ns()}.tmp")
        path.rename(stale)
        shutil.rmtree(stale, ignore_errors=True)

    def set_aside(self, after: int) -> list[int]:
        """Renames every checkpoint after step ``after``, so that no resume goes on from it (rank 0).

        They are kept as ``aside-<step>`` until the next ones are set aside.

        Raises:
            LeaseError: a newer attempt has begun; nothing was touched.
            OSError: the disk refuses.
        """
        self.lease()
        steps = [step for step in self.steps() if step > after]
        for old in self.folder.glob("aside-*") if steps else ():
            shutil.rmtree(old, ignore_errors=True)
        for step in steps:
            self.path(step).rename(self.folder / f"aside-{step:08d}")
        return steps

    def _retain(self, newest: int) -> None:
        best = self.best()
        for step in self.steps()[self.keep :]:
            if step not in (best, newest):
                self._remove(step)

    def manifest(self, step: int) -> Manifest:
        """Reads a manifest.

        Raises:
            CheckpointError: it is damaged, or has another format.
        """
        path = self.path(step) / "manifest.json"
        try:
            manifest = from_plain(Manifest, json.loads(path.read_text()))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: not a readable manifest ({error})") from error
        if manifest.format != FORMAT or manifest.step != step:
            raise CheckpointError(f"{path}: format {manifest.format}, step {manifest.step}; need {FORMAT}, {step}")
        return manifest

    def verify(self, step: int, names: Iterable[str] | None = None) -> Manifest:
        """Checks size and SHA-256 of a checkpoint's files: all of them, or those of ``names`` that its manifest lists.

        Raises:
            CheckpointError: names the damaged file and what is wrong with it.
        """
        manifest = self.manifest(step)
        for name in manifest.files if names is None else [n for n in names if n in manifest.files]:
            path, entry = self.path(step) / name, manifest.files[name]
            try:
                size = path.stat().st_size
                if size != entry.bytes:
                    raise CheckpointError(f"{path}: {size} bytes, the manifest says {entry.bytes}")
                if _sha256(path) != entry.sha256:
                    raise CheckpointError(f"{path}: SHA-256 differs from the manifest's; the file is damaged")
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
        return manifest

    def load(self, step: int, name: str, *, mapped: bool = False) -> dict[str, Any]:
        """Loads one file of a verified checkpoint, with its tensors on the CPU.

        Where ``mapped`` they lie in the file, which all ranks of a machine share; copy them soon.
        """
        path = self.path(step) / name
        import torch

        try:
            payload: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:
            raise CheckpointError(f"{path}: cannot be loaded ({type(error).__name__}: {error})") from error
        return payload

    def rank_steps(self) -> list[int]:
        """Steps with a score in a readable manifest, best first; of two equal scores the later step first."""
        scored = []
        for step in self.steps():
            try:
                score = self.manifest(step).score
            except CheckpointError:
                continue
            if score is not None:
                scored.append((score, step))
        return [step for _, step in sorted(scored, reverse=True)]

    def best(self) -> int | None:
        """The first of `ranked`; None if no checkpoint has a score."""
        return next(iter(self.rank_steps()), None)
