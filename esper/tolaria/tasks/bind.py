"""Joins a data set to the task of a run."""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esper.leyline.errors import ConfigError
from esper.tolaria.data.clusters import Clusters
from esper.tolaria.data.over import LeadingPart
from esper.tolaria.data.parts import PART_NAMES, Bundle, Part
from esper.tolaria.tasks.configs import OfDataConfig
from esper.tolaria.tasks.labels import LabelTask
from esper.tolaria.tasks.multilabel import MultiLabelTask
from esper.tolaria.tasks.numbers import RegressionTask
from esper.tolaria.tasks.positions import PositionTask
from esper.tolaria.tasks.registry import build_task
from esper.tolaria.tasks.targets import Weighted
from esper.tolaria.tasks.task import Task


def task_of(bundle: Bundle) -> Task:
    """The task of a bundle: the one that a run has joined it to, else the one that it is made for."""
    return build_task(OfDataConfig(), bundle) if bundle.learns is None else bundle.learns


def bind(bundle: Bundle, config: Any, task: Task | None = None) -> Bundle:
    """The data as the task wants them, and the task under ``learns``; a bundle that is joined already stays.

    Args:
        bundle: as loaded.
        config: of the task.
        task: the task itself, where it is that of other data.

    Raises:
        ConfigError: the task does not fit the data.
    """
    if bundle.learns is not None:
        return bundle
    task = build_task(config, bundle) if task is None else task
    why_wrong = partial(why_no_target, task, bundle.classes)
    split = {name: getattr(bundle, name).split_by(task.split, why_wrong) for name in PART_NAMES}
    parts: dict[str, Any] = {name: task.prepare(part) for name, part in split.items()}
    own = any(parts[name] is not getattr(bundle, name) for name in ("train", "probe"))
    if task.group == 1:
        return replace(bundle, **parts, learns=task, refills=bundle.refills and not own)
    parts = {name: _whole_groups(part, task, name) for name, part in parts.items()}
    clusters: dict[str, Any] = {}
    for name in ("probe", "train"):
        known: Clusters = getattr(bundle, f"{name}_clusters")
        if len(known) != len(getattr(bundle, name)):
            raise ConfigError(
                f"task.group = {task.group}: data={bundle.name} has clusters of its own, and groups are clusters too; "
                "leave the clusters of the data out"
            )
        clusters[f"{name}_clusters"] = Clusters(len(parts[name]), torch.arange(len(parts[name])) // task.group)
    return replace(bundle, **parts, **clusters, learns=task, refills=False)


def why_no_target(task: Task, classes: int, target: Any) -> str:
    """Why a target holds other than classes, or than finite numbers; empty if it does not, or if that is not known."""
    if isinstance(target, Weighted):
        if not target.weight.isfinite().all():
            return f"task {task.name}: a sample_weight is not finite; correct it"
        return why_no_target(task, classes, target.target)
    if not isinstance(target, Tensor) or not target.numel():
        return ""
    # one's own task may be a kind of these that leaves such targets out
    if type(task) in (RegressionTask, MultiLabelTask) and not target.isfinite().all():
        wrong = target[~target.isfinite()]
        return f"task {task.name}: a target is {float(wrong[0])}, expected finite numbers; correct it, or leave it out"
    if not isinstance(task, LabelTask | PositionTask):
        return ""
    if target.is_floating_point():
        return f"task {task.name}: a target is {target.dtype}, expected whole numbers"
    counted = target[target != task.ignore] if isinstance(task, PositionTask) else target
    wrong = counted[(counted < 0) | (counted >= classes)]
    if not len(wrong):
        return ""
    return f"a target is {int(wrong.flatten()[0])}, expected 0 to {classes - 1}; correct it, or classes= of the data"


def _whole_groups(part: Part, task: Task, name: str) -> Part:
    size = len(part) // task.group * task.group
    if size < 2 * task.group:
        raise ConfigError(
            f"task.group = {task.group}: the part {name} has {len(part)} samples, need at least two groups; make "
            "task.group smaller"
        )
    return part if size == len(part) else LeadingPart(part, size)
