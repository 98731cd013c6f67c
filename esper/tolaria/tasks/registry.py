"""Tasks by name: a builder registers itself with its config class; `build_task` finds it by ``config.kind``.

To add a task: write its config dataclass (with a field ``kind: str`` whose default is the registered kind) and its row
in `esper.tolaria.tasks.configs`, which needs no torch, subclass `Task`, write a function ``build(config, bundle) ->
Task`` in a module of its own, and add ``conf/task/<kind>.yaml``. Without touching Esper:
``task=custom task.path=my_lab.tasks:MyTask``.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from esper.leyline.errors import ConfigError

if TYPE_CHECKING:
    from esper.tolaria.data.parts import Bundle
    from esper.tolaria.tasks.task import Task

Build = Callable[[Any, "Bundle"], "Task"]
B = TypeVar("B", bound=Build)

TASKS: dict[str, tuple[type, Build]] = {}


def register(config_class: type) -> Callable[[B], B]:
    """Registers a builder under the default of its config class's ``kind``.

    Raises:
        ConfigError: the name is taken.
    """
    name = next(str(field.default) for field in dataclasses.fields(config_class) if field.name == "kind")
    if name in TASKS:
        raise ConfigError(f"task {name!r} is registered already; names taken: {', '.join(sorted(TASKS))}")

    def decorate(build: B) -> B:
        TASKS[name] = (config_class, build)
        return build

    return decorate


def task_config_class(kind: str) -> type:
    """Config class of a task.

    Raises:
        ConfigError: unknown name; the text lists the known ones.
    """
    if kind not in TASKS:
        raise ConfigError(f"task.kind = {kind!r}: unknown task; known are {', '.join(sorted(TASKS))}")
    return TASKS[kind][0]


def build_task(config: Any, bundle: "Bundle") -> "Task":
    """The task of a run.

    Args:
        config: an instance of a registered config class.
        bundle: the data, as loaded.

    Raises:
        ConfigError: it does not fit the data, or a task of the user's own cannot be built.
    """
    return TASKS[config.kind][1](config, bundle)
