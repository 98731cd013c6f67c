"""Tasks: what a run learns from its data, and what it is judged by."""

from esper.tolaria.tasks.bind import bind
from esper.tolaria.tasks.custom import CustomTaskConfig
from esper.tolaria.tasks.labels import ClassificationConfig, LabelTask, LanguageConfig, OfDataConfig
from esper.tolaria.tasks.masked import MaskedLanguageConfig
from esper.tolaria.tasks.multilabel import MultiLabelConfig
from esper.tolaria.tasks.numbers import RegressionConfig
from esper.tolaria.tasks.pairs import ContrastiveConfig
from esper.tolaria.tasks.phased import PhasedTask
from esper.tolaria.tasks.positions import SegmentationConfig, SequenceConfig
from esper.tolaria.tasks.registry import TASKS, build_task, register, task_config_class
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
    "bind",
    "build_task",
    "register",
    "task_config_class",
]
