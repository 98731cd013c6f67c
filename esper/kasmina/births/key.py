"""The key of a library entry: everything that decides the bits of a seed, as plain data."""

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
    """The record of one birth.

    Fields:
        blueprint: registered name of the network.
        version: version of the blueprint.
        arguments: keyword arguments of the network's class.
        dim: channels C of the slot's features.
        topology: axes of the slot's features, such as "BTC".
        dtype: dtype of the seed, such as "float32".
        key: key of its private random stream, see `esper.kasmina.births.build.birth_key`.
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
        """Makes the record of a birth; raises what `registry.get` raises."""
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
        """``dtype`` as a torch.dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def id(self) -> str:
        """The id of the birth: 64 hex digits, equal on every machine."""
        text = json.dumps(to_plain(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.blueprint} v{self.version} ({self.topology}, C = {self.dim}, {self.dtype}, key {self.key})"
