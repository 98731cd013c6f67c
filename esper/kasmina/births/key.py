"""What decides every bit of a seed, in plain data: the key of an entry."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from esper.kasmina.blueprints.registry import get
from esper.leyline.plain import to_plain
from esper.leyline.topology import Topology


@dataclass(frozen=True, slots=True, kw_only=True)
class Birth:
    """One birth.

    Fields:
        blueprint, version, arguments: the network, as registered.
        dim, topology, dtype: of the slot's features ("BTC"; "float32").
        key: of its private random stream, see `esper.kasmina.births.build.birth_key`.
    """

    blueprint: str
    version: int
    arguments: dict[str, Any]
    dim: int
    topology: str
    dtype: str
    key: int

    @classmethod
    def of(cls, blueprint: str, *, dim: int, topology: Topology, dtype: torch.dtype, key: int) -> "Birth":
        """The record of a birth; errors as `registry.get`."""
        entry = get(topology, blueprint)
        return cls(
            blueprint=blueprint,
            version=entry.version,
            arguments=dict(entry.arguments),
            dim=dim,
            topology=topology.value,
            dtype=str(dtype).removeprefix("torch."),
            key=key,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def id(self) -> str:
        """64 hex digits, equal on every machine."""
        text = json.dumps(to_plain(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.blueprint} v{self.version} ({self.topology}, C = {self.dim}, {self.dtype}, key {self.key})"
