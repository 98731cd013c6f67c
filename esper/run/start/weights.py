"""Weights that a host starts from: files, another run's checkpoint, a folder of save_pretrained.

They are loaded once, before the first step, and never again: a resume has its own. Every rank maps the same file, so a
machine reads it once; the handshake compares the digest of what was loaded.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from esper.config.tree import EsperConfig
from esper.kasmina.hosts import StartConfig
from esper.kasmina.slots.sites import CONTAINER
from esper.leyline.errors import CheckpointError, ConfigError
from esper.leyline.files import RunDir
from esper.run.export import choose_step
from esper.tolaria.checkpoint.snapshot import read_common
from esper.tolaria.checkpoint.store import CheckpointStore
from esper.tolaria.ranks.digest import digest_tensors

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"


def load_weights_from(config: EsperConfig, host: nn.Module) -> dict[str, Any] | None:
    """Loads the weights that ``host.weights`` names into a host with empty slots; None if it names none.

    Returns:
        For the record, equal on all ranks: where they come from, and their digest.

    Raises:
        ConfigError: a tensor is missing, unknown or of another shape, or the place holds no weights.
        CheckpointError: a checkpoint is damaged.
    """
    if not isinstance(config.host, StartConfig) or config.host.weights is None:
        return None
    path = Path(config.host.weights).expanduser().absolute()
    where = f"host.weights = {config.host.weights!r}"
    tensors, what = _read(path, where, config.host.weights_step)
    _copy(host, tensors, where)
    return {"weights": what, "digest": f"{digest_tensors(sorted(tensors.items())):016x}"}


def _read(path: Path, where: str, step: int | None) -> tuple[dict[str, Tensor], str]:
    if path.is_dir() and RunDir(path).config.is_file():
        store = CheckpointStore.of_run(path)
        if step is not None and step not in store.steps():
            have = ", ".join(map(str, sorted(store.steps()))) or "none"
            raise ConfigError(f"{where}: no checkpoint of host.weights_step = {step}; there are {have}")
        chosen = choose_step(store, step)
        payload, state = read_common(store, chosen)
        grown = [entry.slot for entry in state.slots if entry.stage.has_seed]
        if grown:
            raise ConfigError(
                f"{where}: its network has grown in {', '.join(grown)}; go on from it by trainer.resume_from, or make "
                "it a plain model first (esper export RUN --native)"
            )
        return payload["model"], f"{path}, step {chosen}"
    if step is not None:
        raise ConfigError(f"{where}: is no RUN, so host.weights_step = {step} has no meaning; leave it out")
    if path.is_dir() and (path / INDEX).is_file():
        names = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
        parts = [_read_file(path / name, where) for name in names]
        return {name: tensor for part in parts for name, tensor in part.items()}, str(path)
    if path.is_dir() and (path / WHOLE).is_file():
        return _read_file(path / WHOLE, where), str(path)
    if path.is_file():
        return _read_file(path, where), str(path)
    what = f"holds neither a run nor {WHOLE}" if path.is_dir() else "is not there"
    raise ConfigError(f"{where}: {what}; name a file of weights, a RUN, or a folder of save_pretrained")


def _read_file(path: Path, where: str) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # each library raises of many kinds
        raise CheckpointError(f"{where}: {path.name} cannot be read ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ConfigError(f"{where}: {path.name} holds no state dict, names with tensors; save model.state_dict()")
    return dict(loaded)


def _copy(host: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies every tensor into its place; tied parameters may stand under one of their names."""
    own = {name: tensor for name, tensor in host.state_dict().items() if not name.startswith(f"{CONTAINER}.")}
    prefix = "model." if not set(tensors) & set(own) and any(f"model.{name}" in own for name in tensors) else ""
    given = {f"{prefix}{name}": tensor for name, tensor in tensors.items() if not name.startswith(f"{CONTAINER}.")}
    places = {own[name].data_ptr() for name in given if name in own}
    missing = sorted(name for name in own if name not in given and own[name].data_ptr() not in places)
    unknown = sorted(set(given) - set(own))
    wrong = [
        f"{name} {tuple(given[name].shape)}, the host has {tuple(own[name].shape)}"
        for name in sorted(set(own) & set(given))
        if own[name].shape != given[name].shape
    ]
    if missing or unknown or wrong:
        lists = {"missing": missing, "unknown": unknown, "of another shape": wrong}
        text = "; ".join(f"{what}: {', '.join(names[:4])}{_more(names)}" for what, names in lists.items() if names)
        raise ConfigError(f"{where}: does not fit the host; {text}")
    with torch.no_grad():
        for name, tensor in given.items():
            own[name].copy_(tensor)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 4} more" if len(names) > 4 else ""
