"""A session in one file: written whole or not at all, read by plain ``torch.load(path, weights_only=True)``.

format, kind, sha256          of this layout; SHA-256 over everything else: names, types and bits
settings, controller          the session's config; the controller's settings and state
topology                      the sites, by slot id
run_state, step, epoch        the agreed record, optimizer steps, epochs
model                         state dict of the grown model; the host keeps its own keys
optimizer                     class, host groups with their options, state by parameter name
scheduler, scaler             state dicts, None without one
ema                           decay, and averages of the weights by parameter name; None without
ranks                         per rank: random number state, and the counts since the last tick
"""

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.leyline.errors import CheckpointError
from esper.leyline.files import write_whole
from esper.leyline.imports import why_foreign
from esper.leyline.protocols import Controller
from esper.tolaria.growth.adopt import AdoptedOptimizer

FORMAT = 21
KIND = "esper session"
KEYS = {
    "format",
    "kind",
    "settings",
    "controller",
    "topology",
    "copies",
    "memory",
    "run_state",
    "step",
    "epoch",
    "model",
    "optimizer",
    "scheduler",
    "scaler",
    "ema",
    "ranks",
}


def as_number(value: Any) -> Any:
    """The Python number that a numpy scalar holds; anything else as it is."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.bool_ | numpy.integer | numpy.floating):
        return value.item()
    return value


def to_saveable(value: Any, path: str) -> Any:
    """Converts a value into what ``weights_only`` loads: dicts, lists, tuples, scalars (numpy's as
    Python's), tensors.

    Args:
        value: any tree.
        path: its name in error texts.

    Raises:
        CheckpointError: the tree holds something else; the text names where.
    """
    if isinstance(value, Mapping):
        return {key: to_saveable(item, f"{path}.{key}") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(to_saveable(item, f"{path}[{index}]") for index, item in enumerate(value))
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or type(value) in (bool, int, float, str):
        return value
    number = as_number(value)
    if number is not value:
        return number
    raise CheckpointError(
        f"{path}: a {type(value).__name__} cannot be saved, only numbers, text, tensors and containers"
    )


def collect_user_parts(
    adopted: AdoptedOptimizer, controller: Controller | None, controller_plain: dict[str, Any] | None
) -> dict[str, Any]:
    """Collects what the user brought: controller, optimizer without its state, scheduler, scaler.

    Raises:
        CheckpointError: one of them holds something that cannot be saved; the text names where.
    """
    scheduler, scaler = adopted.scheduler, adopted.scaler
    return {
        "controller": {
            "config": controller_plain,
            "state": None if controller is None else to_saveable(controller.state_dict(), "controller"),
        },
        "optimizer": {
            "class": f"{type(adopted.optimizer).__module__}.{type(adopted.optimizer).__qualname__}",
            "groups": to_saveable(adopted.host_groups(), "optimizer"),
        },
        "scheduler": None if scheduler is None else to_saveable(scheduler.state_dict(), "scheduler"),
        "scaler": None if scaler is None else to_saveable(scaler.state_dict(), "scaler"),
    }


def content_digest(value: Any) -> str:
    """SHA-256 over names, types and bits of a tree of plain data and tensors."""
    hasher = hashlib.sha256()

    def take(item: Any) -> None:
        if isinstance(item, dict):
            hasher.update(b"{%d" % len(item))
            for key in item:
                hasher.update(repr(key).encode())
                take(item[key])
        elif isinstance(item, list | tuple):
            hasher.update(b"[%d" % len(item))
            for entry in item:
                take(entry)
        elif isinstance(item, Tensor):
            hasher.update(f"|{item.dtype}{tuple(item.shape)}".encode())
            hasher.update(item.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            hasher.update(f"|{type(item).__name__} {item!r}".encode())

    take(value)
    return hasher.hexdigest()


def write_session_file(path: Path, payload: dict[str, Any]) -> None:
    """Writes the file, whole or not at all; raises OSError or RuntimeError if the disk fails."""
    content = {**payload, "sha256": content_digest(payload)}
    write_whole(path, lambda file: torch.save(content, file), mode=0o644)  # it may name code that a restore runs


def read_session_file(path: Path) -> tuple[dict[str, Any], str | None]:
    """Reads and verifies a file of `write_session_file`.

    Returns:
        Its content, and why it is not the caller's own, see `esper.leyline.imports.why_foreign`.

    Raises:
        CheckpointError: the file cannot be read, is damaged, is of another kind or format, or a key is missing or
            unknown.
    """
    try:
        with path.open("rb") as file:
            foreign = why_foreign(path, os.fstat(file.fileno()))
            payload = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        lines = [type(error).__name__, *str(error).strip().splitlines()[:1]]
        text = f"cannot be loaded ({': '.join(lines)}); it is damaged, or no file of session.save"
        raise CheckpointError(f"{path}: {text}") from error
    if not isinstance(payload, dict) or payload.get("kind") != KIND:
        raise CheckpointError(f"{path}: not a session's checkpoint; it has no kind {KIND!r}")
    digest = payload.pop("sha256", None)
    check_layout(payload, str(path))
    if digest != content_digest(payload):
        raise CheckpointError(f"{path}: SHA-256 differs from the one it was saved with; the file is damaged")
    return payload, foreign


def check_layout(payload: Mapping[str, Any], where: str) -> None:
    """Refuses a payload of another layout.

    Raises:
        CheckpointError: the format differs, or a key is missing or unknown; the text names it.
    """
    if payload.get("format") != FORMAT:
        raise CheckpointError(f"{where}: format {payload.get('format')!r}, this version reads {FORMAT}")
    missing, unknown = sorted(KEYS - set(payload)), sorted(set(payload) - KEYS)
    if missing or unknown:
        raise CheckpointError(f"{where}: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}")
