"""Imports the user's own objects, which a config names as ``package.module:name``.

A name may stand in a file: RUN/config.yaml, or a session's. Who writes such a file decides which code runs. So a file
that is not one's own decides nothing, unless its reader says that it may (`refuse_foreign_code`).

Our own objects may be imported late, so that a process which only names them does not load what they need:

    BUILDERS = {"cnn": call_later("esper.kasmina.hosts.cnn:build_cnn")}            # imported by the first call
    __getattr__ = export_later(__name__, {"CNN": "cnn"})                           # in a package: package.CNN
"""

import importlib
import os
import pwd
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from esper.leyline.errors import ConfigError


def is_dotted(path: str) -> bool:
    """Returns whether ``path`` has the form ``package.module:name``."""
    module, _, name = path.partition(":")
    return bool(module) and name.isidentifier()


def import_object(path: str, key: str) -> Any:
    """Returns the object that ``path`` names.

    Args:
        path: ``package.module:name``.
        key: config key that holds the path, for error texts.

    Raises:
        ConfigError: the module cannot be imported, or has no such name.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{key} = {path!r}: cannot import {module_name} ({type(error).__name__}: {error}); "
            "it must be importable on every rank (install it, put its folder on PYTHONPATH, or "
            "start in its folder)"
        ) from error
    if not hasattr(module, name):
        defined = {
            entry for entry, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__
        }
        names = sorted(entry for entry in defined if callable(getattr(module, entry)) and not entry.startswith("_"))
        raise ConfigError(f"{key} = {path!r}: {module_name} has no {name}; it has {', '.join(names[:12]) or 'nothing'}")
    return getattr(module, name)


def why_foreign(path: Path, file: os.stat_result | None = None) -> str | None:
    """Says why a file is not one's own: ``belongs to user 12345, not to you``; None if it is.

    One's own is a file that belongs to the caller and that nobody else may write, in a folder in which nobody else may
    put another one in its place. (The superuser may do anything; that cannot be helped.)

    Args:
        path: path of the file.
        file: its status, as `os.fstat` has it for a file that is open already; None asks for it.

    Raises:
        OSError: the file cannot be looked at.
    """
    path = path.resolve()
    stat = os.stat(path) if file is None else file
    if stat.st_uid != os.geteuid():
        return f"belongs to {_user(stat.st_uid)}, not to you ({_user(os.geteuid())})"
    if stat.st_mode & 0o022:
        return f"may be written by {'anyone' if stat.st_mode & 0o002 else 'its group'}"
    folder = os.stat(path.parent).st_mode
    if folder & 0o002 and not folder & 0o1000:
        return f"may be replaced by anyone, as its folder {path.parent} is open to all"
    return None


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name}, user {uid}"
    except KeyError:
        return f"user {uid}"


def refuse_foreign_code(path: Path, why: str | None, code: Mapping[str, str], instead: str) -> None:
    """Refuses code that a file names which is not the caller's own. Call it before anything is imported.

    Args:
        path: of the file.
        why: result of `why_foreign`.
        code: what would be imported, by the name of its setting; nothing is refused if it is empty.
        instead: what a caller types who trusts the file.

    Raises:
        ConfigError: the file is not the caller's own, and names code.
    """
    if why is not None and code:
        named = ", ".join(f"{key} = {value!r}" for key, value in code.items())
        raise ConfigError(
            f"{path}: {why}, and it names code that would be imported and run here: {named}; if you trust it, {instead}"
        )


def call_later(where: str) -> Callable[..., Any]:
    """Returns a function that imports ``module:name`` when it is called, and calls that.

    Args:
        where: ``module:name``.
    """
    module, _, name = where.partition(":")

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return call


def export_later(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a package that imports what it exports when somebody asks for it.

    Args:
        package: its name.
        where: name -> submodule that has it.

    Raises:
        ValueError: a name is that of its submodule, which would stand in its place once it is imported.
    """
    if same := [name for name, module in where.items() if name == module]:
        raise ValueError(f"{package}: {', '.join(same)} would be hidden by the submodule of that name")

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{where[name]}"), name)

    return get
