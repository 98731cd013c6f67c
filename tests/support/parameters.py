"""A view of every parameter that the checker answers for: its owner, what it is, and why it is not trained."""

from dataclasses import dataclass

from esper.kasmina.slots.grown import HOST
from esper.kasmina.slots.sites import CONTAINER
from esper.tolaria.growth.parameters import ParameterChecker


@dataclass(frozen=True, slots=True)
class Record:
    name: str
    owner: str
    kind: str
    refusal: str


def records_of(checker: ParameterChecker) -> dict[str, Record]:
    """Every parameter of the model by name, host first, then slots row-major."""
    records = {}
    for owner, named in checker.grown.owner_parameters().items():
        for name, parameter in named:
            seed = "gate" if name.startswith(f"{CONTAINER}.{owner}.gate.") else "seed"
            kind = HOST if owner == HOST else seed
            records[name] = Record(name, owner, kind, checker.explain_refusal(owner, parameter))
    return records


def teacher_names(checker: ParameterChecker) -> list[str]:
    """The teacher's parameters that are still alive."""
    return [name for name, ref in checker._teacher.values() if ref() is not None]
