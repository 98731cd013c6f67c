"""Imports the user's own objects, which a config names as ``package.module:name``."""

import importlib
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
