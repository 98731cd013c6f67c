"""Checkpoints of the training of a policy: a folder with what all ranks share and what each has of its own.

    FOLDER/update-00000040/shared.pt        weights, optimizer, scale of returns, counters, settings
                           rank-00000.pt    this rank's environments, core states, random streams

Every rank writes its file under a temporary folder. Once all have, rank 0 writes ``shared.pt`` and renames the folder;
so a folder with its final name is complete. All files are tensors and plain data: they load with ``weights_only=True``.
"""

import io
import shutil
from pathlib import Path
from typing import Any

import torch

from esper.leyline.errors import CheckpointError
from esper.leyline.files import sync, write_synced
from esper.simic.ppo.ranks import SUM, Ranks

FORMAT = 1


def save(folder: Path, number: int, shared: dict[str, Any], own: dict[str, Any], ranks: Ranks, *, keep: int) -> Path:
    """Writes the checkpoint after update ``number``; called on every rank. Returns its folder.

    Args:
        folder: of the checkpoints; shared by all ranks.
        number: updates done.
        shared: equal on all ranks.
        own: of this rank.
        ranks: that write together.
        keep: newest checkpoints that are kept.

    Raises:
        OSError: the disk refuses; earlier checkpoints stand.
    """
    path = folder / f"update-{number:08d}"
    temporary = folder / f".{path.name}.tmp"
    if ranks.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    _wait(ranks)
    _write(temporary / f"rank-{ranks.rank:05d}.pt", own)
    _wait(ranks)
    if ranks.rank == 0:
        _write(temporary / "shared.pt", {"format": FORMAT, "ranks": ranks.size, **shared})
        shutil.rmtree(path, ignore_errors=True)  # of a resume from an earlier one
        temporary.rename(path)
        sync(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    _wait(ranks)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("update-*") if path.is_dir())


def load_shared(path: Path) -> dict[str, Any]:
    """Reads what all ranks share of a checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another format.
    """
    shared = _read(path / "shared.pt")
    if shared.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {shared.get('format')}, this esper reads {FORMAT}; use the one that saved"
        )
    return shared


def load(path: Path, ranks: Ranks) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads a checkpoint: what all ranks share, and this rank's own.

    Raises:
        CheckpointError: it is damaged, of another format, or of another number of ranks.
    """
    shared = load_shared(path)
    if shared["ranks"] != ranks.size:
        raise CheckpointError(
            f"{path}: saved by {shared['ranks']} ranks, these are {ranks.size}; start as many as before"
        )
    return shared, _read(path / f"rank-{ranks.rank:05d}.pt")


def _wait(ranks: Ranks) -> None:
    ranks.all_reduce(torch.zeros(1, dtype=torch.float64), SUM, what="save")


def _write(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_synced(path, buffer.getvalue())


def _read(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: not there; the checkpoint is incomplete, remove its folder") from None
    except Exception as error:  # torch raises errors of many kinds about a damaged file
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}); remove its folder") from error
    return state
