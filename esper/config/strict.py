"""Turns plain data into config dataclasses, strictly; reports every problem of a whole tree at once.

Plain data are what YAML holds: dict, list, text, numbers, true, false, null. Enums are written by value (``shadow``,
``adamw``), or by name in lower case if their values are numbers (``cosine``). `esper.leyline.plain` stops at the first
defect of a file that Esper wrote itself; this module reads what a person wrote. So it goes on after a problem, and each
problem says which override would fix it.
"""

import dataclasses
import difflib
import enum
import functools
import math
import re
import types
import typing
from typing import Any

from esper.leyline.errors import ConfigError

_EXPECTED = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text", dict: "a mapping"}
UNSET = "???"  # Hydra and OmegaConf write this for a value that the user must set
_FIELD_LINE = re.compile(r"(\w+) = ")


def _member_text(member: enum.Enum) -> str:
    """A member as it is written in YAML."""
    return member.value if isinstance(member.value, str) else member.name.lower()


def override_text(value: Any) -> str:
    """``value`` as it is typed in an override (``null``, ``true``, ``[r0c0,r1c0]``)."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return _member_text(value)
    if isinstance(value, list | tuple):
        return f"[{','.join(override_text(item) for item in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{override_text(item)}" for key, item in value.items()) + "}"
    return str(value)


def as_plain(value: Any) -> Any:
    """A config object as plain data: the inverse of `Reader.section`."""
    if isinstance(value, enum.Enum):
        return _member_text(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: as_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): as_plain(item) for key, item in value.items()}
    return value


def defaults_of(cls: type) -> dict[str, Any]:
    """Plain data of a config class with every field at its default; ``???`` for a field without one."""
    return {field.name: _default(field) for field in dataclasses.fields(cls)}


def _default(field: Any) -> Any:
    """The default of a field as plain data."""
    if field.default is not dataclasses.MISSING:
        return as_plain(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return as_plain(field.default_factory())
    return UNSET


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def describe_hint(hint: Any) -> str:
    """Describes the values of a type hint."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if option is type(None) else describe_hint(option) for option in options)
    if origin in (list, tuple):
        return "a list" if not options or options[0] is Any else f"a list, each item {describe_hint(options[0])}"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return f"one of {', '.join(_member_text(member) for member in hint)}"
    if origin is dict or dataclasses.is_dataclass(hint):
        return _EXPECTED[dict]
    return _EXPECTED.get(hint, getattr(hint, "__name__", str(hint)))


class _Misfit(Exception):
    """A value does not fit its hint."""


class Reader:
    """Reads sections of a tree and collects problems, one line each: ``optim.lr = -1.0: must be > 0; ...``.

    Fields:
        problems: the lines collected so far.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []

    def problem(self, path: str, value: Any, expected: str, fix: str) -> None:
        """Adds one problem; ``fix`` is what the user can type."""
        self.problems.append(f"{path} = {value!r}: {expected}; {fix}")

    def section(self, cls: type, plain: Any, path: str) -> Any:
        """An object of the dataclass ``cls`` from the mapping ``plain``; None if a problem was added."""
        if not isinstance(plain, dict):
            self.problem(path, plain, "expected a section of settings", f"set {path}.<key>=<value>")
            return None
        before = len(self.problems)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for key in plain:
            if key not in fields:
                near = difflib.get_close_matches(str(key), list(fields), n=1)
                fix = f"did you mean {path}.{near[0]}?" if near else f"{path} has {', '.join(fields) or 'no settings'}"
                self.problem(f"{path}.{key}", plain[key], "no such setting", fix)
        values = {}
        for name, field in fields.items():
            here = f"{path}.{name}"
            if name not in plain:
                self.problems.append(f"{here}: missing; set {here}={self._example(field) or '<value>'}")
                continue
            try:
                values[name] = self._value(_hints(cls)[name], plain[name], here)
            except _Misfit:
                hint = _hints(cls)[name]
                self.problem(
                    here, plain[name], f"expected {describe_hint(hint)}", self._fix(here, field, hint, plain[name])
                )
        if len(self.problems) > before:
            return None
        try:
            return cls(**values)
        except ConfigError as error:
            self.problems += [self._class_problem(line, fields, values, path) for line in error.problems]
        return None

    def _value(self, hint: Any, value: Any, path: str) -> Any:
        """``value`` converted to ``hint``; raises _Misfit, or adds the problems of a nested section."""
        origin, options = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            self._check_free(value, path)
            return value
        if origin in (typing.Union, types.UnionType):
            if value is None and type(None) in options:
                return None
            for option in options:
                if option is not type(None):
                    try:
                        return self._value(option, value, path)
                    except _Misfit:
                        continue
            raise _Misfit
        if origin in (list, tuple) or hint in (list, tuple):
            if not isinstance(value, list | tuple):
                raise _Misfit
            item = options[0] if options else Any
            return (origin or hint)(self._value(item, entry, f"{path}.{index}") for index, entry in enumerate(value))
        if origin is dict or hint is dict:
            if not isinstance(value, dict):
                raise _Misfit
            return {key: self._value(options[1] if options else Any, v, f"{path}.{key}") for key, v in value.items()}
        if dataclasses.is_dataclass(hint):
            return self.section(typing.cast(type, hint), value, path)
        return _scalar(hint, value)

    def _check_free(self, value: Any, path: str) -> None:
        """Adds a problem for each number in free settings, such as options, that is not finite."""
        if isinstance(value, float) and not math.isfinite(value):
            fix = f"for example {path}=\"'{override_text(value)}'\" if it is text"
            self.problem(path, value, f"expected {_EXPECTED[float]}", fix)
        for key, entry in (
            value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
        ):
            self._check_free(entry, f"{path}.{key}")

    def _class_problem(self, line: str, fields: dict[str, Any], values: dict[str, Any], path: str) -> str:
        """A problem that a config class raised, with its section's path and, if there is a default, an override."""
        match = _FIELD_LINE.match(line)
        if match is None or match[1] not in fields:
            return f"{path}: {line}"
        return f"{path}.{line}; {self._fix(f'{path}.{match[1]}', fields[match[1]], None, values[match[1]])}"

    def _fix(self, path: str, field: Any, hint: Any, value: Any) -> str:
        """An override that would fix a field; ``hint`` is given if the value has the wrong type."""
        if isinstance(value, bool | int | float) and (hint is str or str in typing.get_args(hint)):
            return f"for example {path}=\"'{override_text(value)}'\" (quoted, it is text)"
        whole = hint is int or int in typing.get_args(hint)
        if whole and isinstance(value, float) and value.is_integer():  # YAML reads 1e3 as a fraction
            return f"set {path}={int(value)}"
        example = self._example(field)
        if example is not None and example != override_text(value):
            return f"for example {path}={example}"
        return f"set {path}=<value>"

    @staticmethod
    def _example(field: Any) -> str | None:
        """The default of a field as it is typed in an override; None without one."""
        default = _default(field)
        return None if default == UNSET else override_text(default)


def _scalar(hint: Any, value: Any) -> Any:
    """A number, text, bool or enum member of the type ``hint``; raises _Misfit."""
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        for member in hint:
            if isinstance(value, str) and value == _member_text(member):
                return member
        raise _Misfit
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise _Misfit
    if isinstance(value, float) and not math.isfinite(value):
        raise _Misfit
    return value
