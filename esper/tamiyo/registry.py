"""The registry of controllers: a decorator registers a config class and a builder under one kind.

To add a controller: write a config dataclass with ``kind: str = "<name>"`` and a class that satisfies
`esper.leyline.protocols.Controller`, decorate it with ``@register("<name>", ItsConfig)``, import its module in
``esper/tamiyo/__init__.py``, and add ``conf/controller/<name>.yaml`` (``defaults: [/ItsConfig@_here_, _self_]`` and
``kind: <name>``). To use a controller without changing
this package, see kind ``custom``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from esper.leyline.errors import ConfigError
from esper.leyline.protocols import Controller
from esper.leyline.slots import sort_slots

Builder = Callable[..., Controller]  # (config, *, slots: tuple[str, ...], seed: int) -> Controller
B = TypeVar("B", bound=Builder)


class _Entry(NamedTuple):
    config_class: type
    builder: Builder


_KINDS: dict[str, _Entry] = {}


def register(kind: str, config_class: type) -> Callable[[B], B]:
    """Returns a decorator that registers a builder (a class is one too) under ``kind``.

    Raises:
        ConfigError: the kind is taken.
    """

    def add(builder: B) -> B:
        if kind in _KINDS:
            raise ConfigError(f"controller kind {kind!r}: registered twice; taken are {', '.join(controller_kinds())}")
        _KINDS[kind] = _Entry(config_class, builder)
        return builder

    return add


def controller_kinds() -> tuple[str, ...]:
    """Returns the registered kinds, sorted."""
    return tuple(sorted(_KINDS))


def _entry(kind: Any) -> _Entry:
    if kind not in _KINDS:
        raise ConfigError(f"controller.kind = {kind!r}: unknown; kinds are {', '.join(controller_kinds())}")
    return _KINDS[kind]


def controller_config_class(kind: str) -> type:
    """Returns the config dataclass of a kind.

    Raises:
        ConfigError: there is no such kind; the text lists the registered ones.
    """
    return _entry(kind).config_class


def build_controller(config: Any, *, slots: tuple[str, ...], seed: int) -> Controller:
    """Builds the controller that ``config.kind`` names.

    Args:
        config: an instance of the kind's config class.
        slots: slot ids in use, in any order.
        seed: seed of the run; controllers that draw derive their numbers from it.

    Raises:
        ConfigError: the kind is unknown, the config is of another kind, a slot is bad, or settings do not fit the
            slots.
    """
    entry = _entry(getattr(config, "kind", None))
    if type(config) is not entry.config_class:
        raise ConfigError(
            f"controller.kind = {config.kind!r}: needs a {entry.config_class.__name__}, got {type(config).__name__}"
        )
    return entry.builder(config, slots=sort_slots(slots), seed=seed)
