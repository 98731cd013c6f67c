"""Finds the run directories below a folder, without leaving it.

A run directory holds ``config.yaml`` and ``attempt.json`` (or events). A link that leads out of the folder is passed
over and said; one that stays inside leads to what is found anyway. Nothing is opened here.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from esper.leyline.errors import RunDirError
from esper.leyline.files import RunDir

# Folders of a run in which no other run lies.
_OWN = ("checkpoints", "heartbeat", "library", "orders", "wandb")


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundRun:
    """A run directory below the folder that was searched.

    Fields:
        name: its path below that folder, with ``/``; ``.`` for the folder itself.
        path: where it is.
    """

    name: str
    path: Path

    @property
    def directory(self) -> RunDir:
        """Its names."""
        return RunDir(self.path)

    def event_files(self) -> list[Path]:
        """Its event files that are plain files of this folder: rank 0's first, then those of the other ranks."""
        files = [self.directory.events, *sorted(self.path.glob("events-rank-*.jsonl"))]
        return [file for file in files if file.is_file() and not file.is_symlink()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What lies below a folder.

    Fields:
        root: the folder, resolved.
        runs: the runs, sorted by name.
        skipped: one line for each thing that was passed over, and why.
    """

    root: Path
    runs: tuple[FoundRun, ...]
    skipped: tuple[str, ...]


def find_runs(root: Path) -> Found:
    """Finds all runs at and below a folder.

    Raises:
        RunDirError: there is no such folder.
    """
    if not root.is_dir():
        raise RunDirError(f"{root}: no such folder; name the folder below which the runs lie")
    top = root.resolve()
    skipped: list[str] = []
    runs = [FoundRun(name=path.relative_to(top).as_posix(), path=path) for path in _walk(top, top, skipped)]
    return Found(root=top, runs=tuple(sorted(runs, key=lambda run: run.name)), skipped=tuple(skipped))


def name_no_run(path: Path) -> RunDirError:
    """What to say of a folder that was named as a run and is none: the runs that were probably meant."""
    below = "runs" / path  # as `esper runs` names it
    meant = sorted(file.parent for file in path.glob("*/config.yaml"))
    meant += [below] if RunDir(below).config.is_file() else []
    names = ", ".join(map(str, meant[:5])) + (", ..." if len(meant) > 5 else "")
    instead = f"name one of {names}" if meant else "`esper runs` lists those that are"
    return RunDirError(f"{path}: no run directory (there is no config.yaml in it); {instead}")


def _walk(folder: Path, top: Path, skipped: list[str]) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        skipped.append(f"{folder}: not readable ({error.strerror})")
        return
    names = {entry.name for entry in entries}
    is_run = "config.yaml" in names and bool(names & {"attempt.json", "events.jsonl", "STATUS.json"})
    for entry in entries:
        if entry.is_symlink():
            target = Path(entry.path).resolve()
            if not target.is_relative_to(top):
                skipped.append(f"{entry.path}: a link that leads out of {top}")
            elif is_run and entry.name.startswith("events"):
                skipped.append(f"{entry.path}: a link, and events are read from plain files only")
        elif is_run and entry.name.startswith("events") and not entry.is_file(follow_symlinks=False):
            skipped.append(f"{entry.path}: not a plain file")
    if is_run:
        yield folder
    for entry in entries:
        inner = entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        if inner and not (is_run and (entry.name in _OWN or entry.name.startswith("export-"))):
            yield from _walk(Path(entry.path), top, skipped)
