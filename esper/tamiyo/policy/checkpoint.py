"""A trained policy in a file: plain data and tensors, which plain ``torch.load`` reads without running code.

format      of this file
features    names and versions of what it reads, see `esper.tamiyo.policy.features`
options     what its heads choose from, by name
network     width, hidden
weights     tensors by name, float32
digest      of the weights, which a damaged file does not have
made        how it was made: command, seeds, digest of the code, and what else is worth knowing
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.leyline.errors import ConfigError
from esper.leyline.files import write_whole
from esper.leyline.plain import to_plain
from esper.tamiyo.policy.features import read_layout
from esper.tamiyo.policy.network import GrowthAgent
from esper.tamiyo.policy.options import read_options

FORMAT = 1
KEYS = ("format", "features", "options", "network", "weights", "digest", "made")
MADE = ("command", "seeds", "code")


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """Digest of tensors with their names, types and shapes, as 32 hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def save_policy(path: Path, agent: GrowthAgent, made: Mapping[str, Any]) -> None:
    """Writes a policy, whole or not at all.

    Args:
        path: of the file; its folder must exist.
        agent: with its weights.
        made: how it was made, plain data; ``command``, ``seeds`` and ``code`` (a digest) at least.

    Raises:
        ValueError: ``made`` does not say how it was made.
        OSError: the disk refuses.
    """
    missing = [key for key in MADE if key not in made]
    if missing:
        raise ValueError(f"a policy needs to say how it was made: {', '.join(missing)} missing")
    weights = {name: tensor.detach().cpu().float().clone() for name, tensor in agent.state_dict().items()}
    payload = {
        "format": FORMAT,
        "features": agent.layout.plain(),
        "options": agent.options.plain(),
        "network": {"width": agent.width, "hidden": agent.hidden},
        "weights": weights,
        "digest": weights_digest(weights),
        "made": to_plain(dict(made)),
    }
    write_whole(path, lambda file: torch.save(payload, file))


def load_policy(path: Path, where: str | None = None) -> tuple[GrowthAgent, dict[str, Any], str]:
    """Reads a policy; no random stream moves.

    Args:
        path: of the file.
        where: what errors call it; None is its path.

    Returns:
        The agent, on the CPU; how it was made; the digest of its weights.

    Raises:
        ConfigError: there is no such file, it is damaged or no policy, or it was trained on features of another
            meaning; one line says which.
    """
    where = str(path) if where is None else where
    payload = _read(path, where)
    if not isinstance(payload, dict) or "format" not in payload or "weights" not in payload:
        raise ConfigError(f"{where}: no trained policy; name the file of one, see docs/policy.md")
    if payload["format"] != FORMAT:
        raise ConfigError(f"{where}: format {payload['format']!r}, this code reads {FORMAT}; train the policy again")
    odd = sorted(set(payload) ^ set(KEYS))
    if odd:
        raise ConfigError(f"{where}: missing or unknown {', '.join(odd)}; the file is damaged, take another copy")
    layout, options = read_layout(payload["features"], where), read_options(payload["options"], where)
    if weights_digest(payload["weights"]) != payload["digest"]:
        raise ConfigError(f"{where}: its weights are not those that were saved; the file is damaged, take another copy")
    with torch.device("meta"):  # draws nothing
        agent = GrowthAgent(layout, options, **payload["network"])
    try:
        agent.load_state_dict(payload["weights"], assign=True)
    except RuntimeError as error:
        line = " ".join(str(error).split())
        raise ConfigError(f"{where}: weights of another network: {line}; train the policy again") from None
    return agent.eval().requires_grad_(False), payload["made"], payload["digest"]


def _read(path: Path, where: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        why = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise ConfigError(f"{where}: {why}; name the file of a trained policy, see docs/policy.md") from None
    except Exception as error:  # pickle, zip and torch each have their own errors for a damaged file
        raise ConfigError(
            f"{where}: damaged, or no trained policy ({type(error).__name__}); take another copy of it"
        ) from None
