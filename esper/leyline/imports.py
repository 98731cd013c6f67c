"""Things of the user's own, named ``package.module:name`` in a config."""

import importlib
from typing import Any

from esper.leyline.errors import ConfigError


def is_dotted(path: str) -> bool:
    """Whether ``path`` has the form ``package.module:name``."""
    module, _, name = path.partition(":")
    return bool(module) and name.isidentifier()


def import_object(path: str, key: str) -> Any:
    """What ``path`` names.

    Args:
        path: ``package.module:name``. key: the config key it stands in, for an error.

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
        own = {entry for entry, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        here = sorted(entry for entry in own if callable(getattr(module, entry)) and not entry.startswith("_"))
        raise ConfigError(f"{key} = {path!r}: {module_name} has no {name}; it has {', '.join(here[:12]) or 'nothing'}")
    return getattr(module, name)
