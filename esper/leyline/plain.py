"""Strict conversion between our dataclasses and plain data (dict, list, str, int, float, bool, None).

Used for checkpoints, event files and digests. A missing or unknown field is an error that names it. Enums are written
by member name, so that reordering an enum cannot change the meaning of a file.
"""

import dataclasses
import enum
import functools
import hashlib
import json
import types
import typing
from typing import Any, TypeVar

T = TypeVar("T")
_SCALARS = frozenset({type(None), bool, int, float, str})


@functools.cache
def _field_names(cls: type) -> tuple[str, ...] | None:
    """The field names of a dataclass that is not an enum; None for any other class."""
    if not dataclasses.is_dataclass(cls) or issubclass(cls, enum.Enum):
        return None
    return tuple(field.name for field in dataclasses.fields(cls))


def to_plain(value: Any) -> Any:
    """Converts a dataclass, enum, tuple, list, dict or scalar to plain data."""
    kind = type(value)
    if kind in _SCALARS:  # the exact type, since an enum may be a str or an int too
        return value
    names = _field_names(typing.cast(Any, kind))
    if names is not None:
        return {name: to_plain(getattr(value, name)) for name in names}
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"no plain form for {type(value).__name__}")


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = typing.get_origin(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        rest = [option for option in options if option is not type(None)]
        if len(rest) == 1:
            return _convert(rest[0], value, path)
        if type(value) in rest:
            return value
        raise ValueError(f"{path}: {value!r} fits none of {rest}")
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{path}: expected a list, got {type(value).__name__}")
        item = typing.get_args(hint)[0]
        return origin(_convert(item, entry, f"{path}[{index}]") for index, entry in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{path}: expected a mapping, got {type(value).__name__}")
        item = typing.get_args(hint)[1]
        return {key: _convert(item, entry, f"{path}.{key}") for key, entry in value.items()}
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, path)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint[value]
        except KeyError:
            raise ValueError(f"{path}: {value!r} is none of {', '.join(hint.__members__)}") from None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ValueError(f"{path}: expected {getattr(hint, '__name__', hint)}, got {value!r}")
    return value


def from_plain(cls: type[T], data: Any, path: str = "") -> T:
    """Builds a dataclass from plain data.

    Raises:
        ValueError: a field is missing, unknown or of another type; the text names its path.
    """
    path = path or cls.__name__
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping, got {type(data).__name__}")
    names = [field.name for field in dataclasses.fields(typing.cast(Any, cls))]
    missing, unknown = set(names) - set(data), set(data) - set(names)
    if missing or unknown:
        parts = [f"missing {', '.join(sorted(missing))}"] if missing else []
        parts += [f"unknown {', '.join(sorted(map(str, unknown)))}"] if unknown else []
        raise ValueError(f"{path}: {'; '.join(parts)}")
    hints = _hints(typing.cast(Any, cls))
    return cls(**{name: _convert(hints[name], data[name], f"{path}.{name}") for name in names})


def digest62(value: Any) -> int:
    """Returns a 62-bit digest of plain data (so that both d and -d fit an int64), equal on every machine.

    It is BLAKE2b of canonical JSON, with floats in their shortest exact decimal form.
    """
    text = json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 2
