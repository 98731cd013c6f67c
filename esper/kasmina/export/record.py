"""What an export made: the plain model, and the record of what became of each seed and of each key."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn

from esper.kasmina.export.same import Inputs


class Way(StrEnum):
    """What became of a seed."""

    LEFT_OUT = "left out"
    FOLDED = "folded"
    MODULE = "module"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedSlot:
    """What became of one slot's seed.

    Fields:
        slot, site, place: id, name of the host's submodule, place of the feature in its output (None: all of it).
        seed: class that the seed had. alpha: in force at export. operator: of the join.
        way: see `Way`. where: name of the module that holds it now, None if left out.
        parameters: of the seed in the grown model.
    """

    slot: str
    site: str
    place: int | str | None
    seed: str
    alpha: float
    operator: str
    way: Way
    where: str | None
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exported:
    """A plain model and what is known of it.

    Fields:
        module: in eval(); no class of esper in it.
        slots: what became of each seed, row-major; empty slots are not listed.
        keys: key of every entry in the grown model's state dict -> its key now, None where it was folded or left out.
        example: positional and keyword inputs that it was checked on. output: what it returns for them, in eval().
        exact: checked bit for bit; False: to a tolerance, since something was folded or FlexAttention became SDPA.
    """

    module: nn.Module
    slots: tuple[ExportedSlot, ...]
    keys: Mapping[str, str | None]
    example: Inputs
    output: Any
    exact: bool
