"""A task of your own: any class that is a `Task`.

kind: custom
path: my_lab.tasks:Counting            # class Counting(esper.Task), built as Counting(bundle=..., **options)
options: {scale: 2.0}
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from esper.leyline.errors import ConfigError
from esper.leyline.fields import Checks
from esper.leyline.imports import import_object, is_dotted
from esper.tolaria.data.parts import Bundle
from esper.tolaria.tasks.registry import register
from esper.tolaria.tasks.task import Task


@dataclass(kw_only=True, slots=True)
class CustomTaskConfig:
    """Where the class is, and its keyword arguments."""

    kind: str = "custom"
    """Registered name of this kind: ``custom``."""

    path: str
    """``package.module:Class``, importable on every rank: a subclass of `esper.Task`, or a function that returns one.
    """

    options: dict[str, Any] | None = None
    """Keyword arguments, {scale: 2.0}; ``bundle``, the data, is given besides where the class takes it. null: none."""

    def __post_init__(self) -> None:
        with Checks(self) as check:
            check("kind", self.kind == "custom", "must be 'custom'")
            check("path", is_dotted(self.path), "write package.module:Class")
            check("options", "bundle" not in (self.options or {}), "bundle is given by the data; leave it out")


@register(CustomTaskConfig)
def build_custom(config: CustomTaskConfig, bundle: Bundle) -> Task:
    """Builds the class at ``config.path``.

    Raises:
        ConfigError: it cannot be imported, does not take the options, is no task, or its declarations contradict each
            other.
    """
    build: Callable[..., Any] = import_object(config.path, "task.path")
    options = dict(config.options or {})
    if "bundle" in inspect.signature(build).parameters:
        options["bundle"] = bundle
    try:
        inspect.signature(build).bind(**options)
    except TypeError as error:
        raise ConfigError(f"task.options = {config.options!r}: {config.path} does not take these; {error}") from None
    task = build(**options)
    if not isinstance(task, Task):
        raise ConfigError(f"task.path = {config.path!r}: returned {type(task).__name__}, need an esper.Task")
    task.name = task.name or config.path.partition(":")[2]
    names = [metric.info.name for metric in task.metrics]
    wrong = [name for name in (*names, *task.columns) if not name.isidentifier()]
    if wrong:
        raise ConfigError(f"task.path = {config.path!r}: {wrong[0]!r} is no name; use letters, digits and _")
    taken = [name for name in names if name in ("loss", "accuracy") or names.count(name) > 1]
    if taken:
        raise ConfigError(f"task.path = {config.path!r}: a metric of the name {taken[0]} is there already; rename it")
    if task.group < 1:
        raise ConfigError(f"task.path = {config.path!r}: group = {task.group}, must be >= 1")
    task.info()
    return task
