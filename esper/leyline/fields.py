"""Fields of dataclasses: range checks that name the field, and the docstring under each, for the pages of all settings.

    @dataclass
    class GateConfig:
        looks: int = 5
        \"\"\"Scheduled looks at G2 in a life.\"\"\"

Python keeps no docstring of a field, so the source is parsed.
"""

import ast
import dataclasses
import inspect
import re
import textwrap
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


class Checks:
    """Collects failed checks of one config object, then raises them together.

    Example:
        >>> def __post_init__(self):
        ...     with Checks(self) as check:
        ...         check("lr", self.lr > 0, "must be > 0")
    """

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._problems: list[str] = []

    def __enter__(self) -> "Checks":
        return self

    def __call__(self, field: str, ok: bool, expected: str) -> None:
        """Notes a problem unless ``ok``; ``expected`` says what value the field must have."""
        if not ok:
            self._problems.append(f"{field} = {getattr(self._owner, field)!r}: {expected}")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None and self._problems:
            raise ConfigError(self._problems)
