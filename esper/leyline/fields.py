"""Fields of dataclasses: range checks that name the field, and the docstring under each, for the pages of all settings.

    @dataclass
    class GateConfig:
        looks: int = 5
        \"\"\"Scheduled looks at G2 in a life.\"\"\"

Python keeps no docstring of a field, so the source is parsed.
"""

import ast
import dataclasses
import enum
import inspect
import re
import textwrap
import typing
from typing import Any

from esper.leyline.errors import ConfigError


def field_docs(cls: type) -> dict[str, str]:
    """Docstring of each field, in one line; without an entry where there is none. A field that a subclass declares
    anew without a docstring keeps its parent's."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            found |= _own(base)
    return {field.name: found[field.name] for field in dataclasses.fields(cls) if field.name in found}


def class_doc(cls: type) -> str:
    """A class's docstring in one line."""
    return _line(cls.__doc__ or "")


def _own(cls: type) -> dict[str, str]:
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for entry, below in zip(tree.body, tree.body[1:], strict=False):
        if not isinstance(entry, ast.AnnAssign) or not isinstance(entry.target, ast.Name):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            found[entry.target.id] = _line(below.value.value)
    return found


def _line(text: str) -> str:
    return " ".join(text.split())


def as_markdown(text: str) -> str:
    """Our docstrings' double backticks as single ones, and no bar that would end a table's cell."""
    return re.sub(r"``(.+?)``", r"`\1`", text).replace("|", "\\|")


_ENUMS: dict[type, dict[str, tuple[type[enum.Enum], bool]]] = {}


def _enum_fields(cls: type) -> dict[str, tuple[type[enum.Enum], bool]]:
    """The fields that hold a member of an enum: the enum, and whether they may be None."""
    if cls in _ENUMS:
        return _ENUMS[cls]
    found = _ENUMS[cls] = {}
    for name, hint in typing.get_type_hints(cls).items():
        kinds = list(typing.get_args(hint)) or [hint]
        members = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, enum.Enum)]
        if members and set(kinds) <= {members[0], type(None)}:
            found[name] = members[0], type(None) in kinds
    return found


def _member(kind: type[enum.Enum], value: Any) -> enum.Enum | None:
    """The member that ``value`` is, or that it names by value or name; None if there is none."""
    if isinstance(value, kind):
        return value
    return next((m for m in kind if isinstance(value, str) and value in (m.value, m.name, m.name.lower())), None)


class Checks:
    """Collects failed checks of one config object, then raises them together.

    Before them, text in a field of an enum becomes the member that it names, by value or name; anything else there is
    an error.

    Example:
        >>> def __post_init__(self):
        ...     with Checks(self) as check:
        ...         check("lr", self.lr > 0, "must be > 0")
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._problems: list[str] = []

    def __enter__(self) -> "Checks":
        wrong = []
        for name, (kind, optional) in _enum_fields(type(self._owner)).items():
            value = getattr(self._owner, name)
            member = _member(kind, value)
            if member is not None:
                object.__setattr__(self._owner, name, member)
            elif value is not None or not optional:
                names = ", ".join(m.value if isinstance(m.value, str) else m.name.lower() for m in kind)
                wrong.append(f"{name} = {value!r}: must be one of {names}")
        if wrong:
            raise ConfigError(wrong)
        return self

    def __call__(self, field: str, ok: bool, expected: str) -> None:
        """Notes a problem unless ``ok``; ``expected`` says what value the field must have."""
        if not ok:
            self._problems.append(f"{field} = {getattr(self._owner, field)!r}: {expected}")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None and self._problems:
            raise ConfigError(self._problems)


def why_no_pattern(pattern: str | None) -> str:
    """Why a regular expression cannot find a place in text (where a document begins); empty if it can."""
    try:
        empty = pattern is not None and re.compile(pattern.encode(), re.MULTILINE).search(b"") is not None
    except re.error as error:
        return str(error)
    return "it matches empty text" if empty else ""
