"""Esper trains neural networks that grow while they train, on many processes in lockstep.

``esper.attach`` and ``esper.Session`` are imported when they are first used, so that ``import esper.leyline`` loads no
torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from esper.kasmina.attach import attach
    from esper.leyline.events.task import MetricInfo
    from esper.session.session import Session
    from esper.tolaria.data.own.custom import Data
    from esper.tolaria.tasks.task import Metric, Scores, Task

__all__ = ["Data", "Metric", "MetricInfo", "Scores", "Session", "Task", "__version__", "attach"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "attach":
        from esper.kasmina.attach import attach

        return attach
    if name == "Session":
        from esper.session.session import Session

        return Session
    if name in ("Metric", "Scores", "Task"):
        from esper.tolaria.tasks import task

        return getattr(task, name)
    if name == "Data":
        from esper.tolaria.data.own.custom import Data

        return Data
    if name == "MetricInfo":
        from esper.leyline.events.task import MetricInfo

        return MetricInfo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
