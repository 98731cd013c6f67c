"""The result of an export: the plain model, and what became of each seed and of each key."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch import nn

from esper.kasmina.export.same import Inputs


class Way(StrEnum):
    """The form in which a seed was exported."""

    LEFT_OUT = "left out"
    FOLDED = "folded"
    MODULE = "module"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedSlot:
    """The record of one slot's seed.

    Fields:
        slot: slot id.
        site: name of the host's submodule.
        place: place of the feature in its output, None where it is the whole output.
        layout: the axes of the feature, such as "TBC"; the graph turns them to the seed's order and back.
        causal: the host is causal there; a seed that mixes positions sees none after its own.
        seed: name of the seed's class.
        alpha: the alpha in force at export.
        operator: the operator of the join.
        way: how it was exported.
        where: name of the module that holds it now, None if left out.
        parameters: parameters of the seed in the grown model.
    """

    slot: str
    site: str
    place: int | str | None
    layout: str
    causal: bool
    seed: str
    alpha: float
    operator: str
    way: Way
    where: str | None
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exported:
    """A plain model, and the record of its export.

    Fields:
        module: the model in eval(), without a class of esper.
        slots: what became of each seed, row-major; empty slots are not listed.
        keys: key of every entry in the grown model's state dict -> its key now, None where it was folded or left out.
        example: positional and keyword inputs on which it was checked.
        output: its output on them, in eval().
        exact: True if it was checked bit for bit; False if to a tolerance, since something was folded or FlexAttention
            became SDPA.
    """

    module: nn.Module
    slots: tuple[ExportedSlot, ...]
    keys: Mapping[str, str | None]
    example: Inputs
    output: Any
    exact: bool
