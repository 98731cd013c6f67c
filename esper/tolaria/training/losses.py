"""The loss that a step goes backward from: the host's, one per seed in a shadow forward, a teacher's terms."""

import contextlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from esper.kasmina.slots.confidence import class_logits
from esper.kasmina.slots.grown import Grown
from esper.tolaria.data.task import Task
from esper.tolaria.growth.growth import Growth
from esper.tolaria.lockstep.window import Window
from esper.tolaria.training.distill import Distillation
from esper.tolaria.training.evaluate import Evaluator, autocast
from esper.tolaria.training.incubation import Call, with_shadows


class StepLoss:
    """Calls the model, and counts what the host's forward gave.

    Args:
        grown, growth: the model, and its present wrapper. window: counts. evaluator: of the run's precision and device.
        task: what a sample costs. distillation: None: nobody teaches.

    Fields:
        teacherless_from: optimizer step from which on there is no teacher though there was one; 0 before.
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
        """From ``distill.until_step`` on there is no teacher, and nothing of it is left."""
        if self.distillation is None or step < (self.distillation.config.until_step or math.inf):
            return
        self.teacherless_from = int(self.distillation.config.until_step or 0)
        self.distillation.release()
        self.distillation = None
        self.growth.parameters.release_teacher()

    def __call__(self, x: Tensor, y: Tensor, weights: Tensor, scale: float, *, shadowed: Sequence[str]) -> Tensor:
        """Host loss plus one shadow loss per slot of ``shadowed``, each with the teacher's term; 0-D.

        Args:
            x, y: samples, on the device. weights: of each, [M]. scale: of their weighted sum.
        """

        def share(loss: Tensor, output: Tensor) -> Tensor:
            if term is not None:
                loss = loss + term(output)
            return (loss * weights.to(loss.dtype)).sum() * scale

        def host() -> Tensor:
            with self.grown.tallied(weights):
                output = self._forward(self.growth.call, x)
            loss, correct = self.task.per_sample(output, y)
            self.window.add_samples(loss, correct, weights)
            return share(loss, output)

        def shadow(call: Call) -> Tensor:
            output = self._forward(call, x)
            return share(self.task.per_sample(output, y)[0], output)

        logits = self._forward(partial(class_logits, self.grown), x)
        lesson = contextlib.nullcontext() if self.distillation is None else self.distillation.lesson(x)
        with lesson as term, self.grown.logits(logits):
            return with_shadows(host, shadow, self.grown, list(shadowed), self.evaluator.world.device)

    def _forward(self, call: Call, x: Tensor) -> Any:
        with autocast(self.evaluator.precision, self.evaluator.world.device):
            return call(x)
