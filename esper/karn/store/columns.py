"""What a view is made of: columns with their meaning, and pieces of SQL over the payload of an event."""

from dataclasses import dataclass, fields
from typing import get_args

from esper.karn.store.facts import RunFacts

Columns = dict[str, tuple[str, str]]  # name -> (type, meaning)

WHERE: Columns = {
    "run": ("VARCHAR", "the run: its path below the root"),
    "attempt": ("INTEGER", "number of the start, from 1"),
    "time": ("TIMESTAMP", "when it was said, UTC"),
    "step": ("BIGINT", "optimizer steps done"),
    "tick": ("BIGINT", "control ticks done"),
}
WHERE_COLUMNS = "run, attempt, time, step, tick"
_TYPES = {"str": "VARCHAR", "int": "BIGINT", "float": "DOUBLE"}


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One view.

    Fields:
        about: what a row is.
        columns: in order.
        sql: the SELECT that makes it out of ``events``; empty for a table that is filled by Python.
    """

    about: str
    columns: Columns
    sql: str = ""


def _docs_of(cls: type) -> dict[str, str]:
    """The meaning of each field, from the docstring of a class."""
    lines = (cls.__doc__ or "").split("Fields:")[1].splitlines()
    told: dict[str, str] = {}
    for line in filter(str.strip, lines):
        if line.startswith(" " * 8) and not line.startswith(" " * 9):
            name, _, meaning = line.strip().partition(": ")
            told[name] = meaning
        else:
            told[name] += " " + line.strip()
    return {name: meaning.rstrip(".").replace("``", "`") for name, meaning in told.items()}


def run_columns() -> Columns:
    """The columns of ``runs``, from the fields of `RunFacts`."""
    docs = _docs_of(RunFacts)
    return {f.name: (_TYPES[(get_args(f.type) or (f.type,))[0].__name__], docs[f.name]) for f in fields(RunFacts)}


def text_of(path: str) -> str:
    """SQL for a field of the payload as text."""
    return f"(payload->>'$.{path}')"


def number_of(path: str, kind: str = "DOUBLE") -> str:
    """SQL for a field of the payload as a number (or another type); null where it is none."""
    return f"try_cast(payload->>'$.{path}' as {kind})"


def select(kind: str, *columns: str) -> str:
    """SQL for the current events of some kinds, separated by spaces, with these columns beside the axes."""
    kinds = ", ".join(f"'{name}'" for name in kind.split())
    return f"select {WHERE_COLUMNS}, {', '.join(columns)} from events where current and kind in ({kinds})"
