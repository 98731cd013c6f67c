"""Tasks: what a run learns from its data, and what it is judged by.

Their settings come without torch; the tasks are imported when they are first asked for.
"""

from typing import TYPE_CHECKING

from esper.leyline.imports import export_later
from esper.tolaria.tasks.configs import (
    ClassificationConfig,
    ContrastiveConfig,
    CustomTaskConfig,
    LanguageConfig,
    MaskedLanguageConfig,
    MultiLabelConfig,
    OfDataConfig,
    RegressionConfig,
    SegmentationConfig,
    SequenceConfig,
)
from esper.tolaria.tasks.registry import TASKS, build_task, register, task_config_class

if TYPE_CHECKING:
    from esper.tolaria.tasks.labels import LabelTask
    from esper.tolaria.tasks.phased import PhasedTask
    from esper.tolaria.tasks.task import Metric, Scores, Task

__all__ = [
    "TASKS",
    "ClassificationConfig",
    "ContrastiveConfig",
    "CustomTaskConfig",
    "LabelTask",
    "LanguageConfig",
    "MaskedLanguageConfig",
    "Metric",
    "MultiLabelConfig",
    "OfDataConfig",
    "PhasedTask",
    "RegressionConfig",
    "Scores",
    "SegmentationConfig",
    "SequenceConfig",
    "Task",
    "build_task",
    "register",
    "task_config_class",
]
__getattr__ = export_later(
    __name__, {"LabelTask": "labels", "PhasedTask": "phased"} | dict.fromkeys(("Metric", "Scores", "Task"), "task")
)
