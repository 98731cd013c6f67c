"""The loss of an optimizer step: the host's, one for each seed in a shadow forward, and the teacher's terms."""

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from esper.kasmina.axes.feature import copy_inputs
from esper.kasmina.slots.confidence import class_logits
from esper.kasmina.slots.grown import Grown
from esper.kasmina.slots.sites import arguments
from esper.tolaria.data.batches import refuse_other_shapes
from esper.tolaria.growth.growth import Growth
from esper.tolaria.lockstep.window import Window
from esper.tolaria.tasks.task import Task
from esper.tolaria.training.distill import Distillation
from esper.tolaria.training.evaluate import Evaluator
from esper.tolaria.training.incubation import Call, with_shadows
from esper.tolaria.training.precision import autocast


class StepLoss:
    """Calls the model, and counts the losses of the host's forward.

    Args:
        grown: the model.
        growth: holds the model's present wrapper.
        window: counts the samples.
        evaluator: has the run's precision and device.
        task: computes the loss of a sample.
        distillation: the teacher's term; None if there is no teacher.

    Fields:
        teacherless_from: optimizer step at which the teacher was released; 0 if none was.
    """

    def __init__(
        self,
        grown: Grown,
        growth: Growth,
        window: Window,
        evaluator: Evaluator,
        task: Task,
        distillation: Distillation | None,
    ) -> None:
        self.grown, self.growth, self.window, self.evaluator, self.task = grown, growth, window, evaluator, task
        self.distillation = distillation
        self.teacherless_from = 0

    def release_teacher(self, step: int) -> None:
        """Releases the teacher, with all its memory, from ``distill.until_step`` on."""
        if self.distillation is None or step < (self.distillation.config.until_step or math.inf):
            return
        self.teacherless_from = int(self.distillation.config.until_step or 0)
        self.distillation.release()
        self.distillation = None
        self.growth.parameters.release_teacher()

    def __call__(self, x: Any, y: Any, weights: Tensor, scale: float, *, shadowed: Sequence[str]) -> Tensor:
        """Host loss plus one shadow loss per slot of ``shadowed``, each with the teacher's term; 0-D.

        Args:
            x: inputs, on the device.
            y: targets, on the device.
            weights: weight of each sample, [M].
            scale: factor of the weighted sum; see `Feed.scale` and `LossScale`.
            shadowed: slots whose seed learns in a shadow forward.
        """

        def share(loss: Tensor, output: Tensor) -> Tensor:
            if term is not None:
                loss = loss + term(output)
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
            return (loss * share_of.to(loss.dtype)).sum() * scale

        def host() -> Tensor:
            with self.grown.tallied(weights):
                # it may write into its input
                output = self._forward(self.growth.call, copy_inputs(x) if shadowed else x)
            scores = task.scored(output, y)
            task.one_each(scores.loss, len(weights))
            correct = torch.zeros_like(scores.loss) if scores.correct is None else scores.correct
            self.window.add_samples(scores.loss, correct, weights, task.rows(scores))
            return share(learned(output) if task.learns_otherwise else scores.loss, output)

        def shadow(call: Call) -> Tensor:
            output = self._forward(call, x)
            return share(learned(output), output)

        def learned(output: Any) -> Tensor:
            loss = task.learned(output, y)
            task.one_each(loss, len(weights), "learn")
            return loss

        task = self.task
        share_of = weights * task.count(y) if task.by_positions else weights
        logits = self._forward(partial(class_logits, self.grown), x)
        lesson = contextlib.nullcontext() if self.distillation is None else self.distillation.lesson(x)
        with lesson as term, self.grown.logits(logits):
            return with_shadows(host, shadow, self.grown, list(shadowed), self.evaluator.world.device)

    def _forward(self, call: Call, x: Any) -> Any:
        args, kwargs = arguments(x)
        try:
            with autocast(self.evaluator.precision, self.evaluator.world.device):
                return call(*args, **kwargs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            refuse_other_shapes(error, x, self.evaluator.bundle.example())
            raise
