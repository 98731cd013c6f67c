"""A task of your own: any class that is a `Task`.

kind: custom
path: my_lab.tasks:Counting            # class Counting(esper.Task), built as Counting(bundle=..., **options)
options: {scale: 2.0}
"""

import inspect
from collections.abc import Callable
from typing import Any

from esper.leyline.errors import ConfigError
from esper.leyline.imports import import_object
from esper.tolaria.data.parts import Bundle
from esper.tolaria.tasks.configs import CustomTaskConfig
from esper.tolaria.tasks.task import Task


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
