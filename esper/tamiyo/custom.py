"""Builds a controller of your own from its dotted path.

    kind: custom
    path: my_lab.growth:Greedy
    options: {threshold: 0.1}

is built as ``Greedy(slots=("r0c0", ...), seed=1, threshold=0.1)``. It must satisfy the `Controller` protocol.
"""

import inspect
from dataclasses import dataclass
from typing import Any

from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks
from esper.leyline.imports import import_object, is_dotted
from esper.leyline.protocols import Controller
from esper.tamiyo.registry import register

_MEMBERS = ("decide", "state_dict", "load_state_dict")


@dataclass(kw_only=True, slots=True)
class CustomConfig:
    """Where the class is, and its keyword arguments."""

    kind: str = "custom"
    """Registered name of this kind: ``custom``."""

    path: str
    """``package.module:Class``, importable on every rank."""

    options: dict[str, Any] | None = None
    """Keyword arguments beside ``slots`` and ``seed``, {margin: 2}; null: none."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("kind", self.kind == "custom", "must be 'custom'")
            check("path", is_dotted(self.path), "write package.module:Class")
            reserved = {"slots", "seed"} & set(self.options or ())
            check("options", not reserved, "slots and seed are given by the run; leave them out")


@register("custom", CustomConfig)
def build_custom(config: CustomConfig, *, slots: tuple[str, ...], seed: int) -> Controller:
    """Builds the class at ``config.path``.

    Raises:
        ConfigError: the class cannot be imported, does not take the options, or does not satisfy the protocol.
    """
    cls, options = import_object(config.path, "controller.path"), config.options or {}
    try:
        inspect.signature(cls).bind(slots=slots, seed=seed, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"controller.path = {config.path!r}: must take slots=..., seed=... and "
            f"controller.options = {options!r}; {error}"
        ) from None
    controller = cls(slots=slots, seed=seed, **options)
    missing = [name for name in _MEMBERS if not callable(getattr(controller, name, None))]
    missing += [] if isinstance(getattr(controller, "name", None), str) else ["name (a string)"]
    if missing:
        raise ConfigError(
            f"controller.path = {config.path!r}: {type(controller).__name__} is no Controller; "
            f"it lacks {', '.join(missing)} (see esper.leyline.protocols.Controller)"
        )
    return controller
