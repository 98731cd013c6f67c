"""What a run learns: the model's inputs out of a batch, a loss per sample in its own unit, and metrics that add up.

    inputs, target = task.split(batch)
    scores = task.score(model(inputs), target)     loss [B]; correct [B] if answers are right or wrong; sums [B] each
    value = metric.value(sums over all samples)    the same for any number of ranks, since sums add up

Everything that is counted over ranks is a sum over samples. A metric that is no mean over samples, such as F1, is a
function of several sums, which are added up first.

Where the loss of a sample depends on others (contrastive pairs), ``group`` says on how many: such a group is dealt
whole to one rank, measured whole, and counts as one cluster of evidence. A group that the end of a part would cut is
left out.

Shapes: B samples.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from esper.leyline.errors import ConfigError, one_line
from esper.leyline.events.task import MetricInfo, TaskInfo
from esper.tolaria.data.batches import split_batch
from esper.tolaria.data.parts import Part
from esper.tolaria.tasks.targets import Mixed, Weighted

WEIGHT = "sample_weight"  # key of a batch
Sums = Mapping[str, float]  # by name: those of the task, and loss, loss_sq, correct, correct_sq, count


@dataclass(frozen=True, slots=True)
class Scores:
    """What a task says of a batch.

    Fields:
        loss: of each sample, [B], in the task's unit.
        correct: share of each sample's answers that are right, [B]; None where there is no right or wrong.
        sums: further numbers of each sample by name, [B] each, which add up over samples; one for each of
            ``Task.columns``.
    """

    loss: Tensor
    correct: Tensor | None = None
    sums: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Metric:
    """A number about all samples together.

    Fields:
        info: name, unit and direction.
        value: computes it from the sums over all samples; None where it has no value, as over no sample.
    """

    info: MetricInfo
    value: Callable[[Sums], float | None]


class Task:
    """A task; subclass it, and override what differs.

    Fields:
        name: its name in records.
        unit: unit of the loss per sample.
        columns: names of the further sums that `score` returns.
        metrics: metrics that are computed from them.
        objective: ``loss``, ``accuracy`` or the name of a metric: what a run is judged by unless its config says else.
        graded: whether `score` says what is correct.
        class_logits: whether the output is one row of class logits per sample, [B, K].
        group: samples whose losses depend on each other.
        by_positions: a step's loss is the mean over all positions of its samples, by `positions`, and not over samples.
    """

    name: str = ""
    unit: str = "nats"
    columns: Sequence[str] = ()
    metrics: Sequence[Metric] = ()
    objective: str = "loss"
    graded: bool = False
    class_logits: bool = False
    group: int = 1
    by_positions: bool = False

    def split(self, batch: Any) -> tuple[Any, Any]:
        """The model's inputs and the target of a batch: (x, y), (x1, x2, ..., y), or a mapping with ``labels``.

        A mapping may hold ``sample_weight`` besides, [B], by which losses are multiplied.

        Inputs that are a tensor are the model's one argument, a tuple its arguments, a dict its keywords.

        Raises:
            ConfigError: the batch is none of these; override this method.
        """
        if isinstance(batch, Mapping) and WEIGHT in batch:
            x, y = self.split({name: value for name, value in batch.items() if name != WEIGHT})
            return x, Weighted(y, batch[WEIGHT])
        return split_batch(batch, f"task {self.name}")

    def prepare(self, part: Part) -> Part:
        """The part as the task needs it, such as with hidden tokens."""
        return part

    def score(self, output: Any, target: Any) -> Scores:
        """Loss per sample, and what metrics are made of. Pure; nothing waits for the device."""
        raise NotImplementedError(f"task {self.name}: override Task.score")

    def learn(self, output: Any, target: Any) -> Tensor:
        """The loss per sample that is trained, [B], where it differs from the one that is reported and judged."""
        return self.score(output, target).loss

    def positions(self, target: Any) -> Tensor:
        """How many positions of each sample count, [B]; its loss is the mean over them. For ``by_positions``."""
        raise NotImplementedError(f"task {self.name}: override Task.positions, or set by_positions = False")

    def chance(self, targets: Iterable[Any]) -> float:
        """The loss of the best constant answer, by targets of the training part; 0: not known, or of no use."""
        return 0.0

    def answers(self, output: Any) -> dict[str, Tensor]:
        """What the output says, by name, [B, ...] each: for `esper predict`."""
        return {"output": read_logits(output, self.name)}

    # for the trainer ----------------------------------------------------------------------------------------------

    @property
    def learns_otherwise(self) -> bool:
        """Whether the loss that is trained differs from the one that is reported."""
        return type(self).learn is not Task.learn

    def scored(self, output: Any, target: Any) -> Scores:
        """`score` of any target: weighted by the weights of samples, or between two targets that are mixed."""
        if isinstance(target, Weighted):
            found = self.scored(output, target.target)
            return replace(found, loss=found.loss * target.weight.to(found.loss))
        if not isinstance(target, Mixed):
            return self.score(output, target)
        one, two = self.scored(output, target.first), self.scored(output, target.second)

        def mix(first: Tensor, second: Tensor) -> Tensor:
            share = target.share.to(first)
            return share * first + (1 - share) * second

        correct = None if one.correct is None or two.correct is None else mix(one.correct, two.correct)
        return Scores(mix(one.loss, two.loss), correct, {k: mix(v, two.sums[k]) for k, v in one.sums.items()})

    def learned(self, output: Any, target: Any) -> Tensor:
        """`learn` of any target; see `scored`."""
        if isinstance(target, Weighted):
            loss = self.learned(output, target.target)
            return loss * target.weight.to(loss)
        if not isinstance(target, Mixed):
            return self.learn(output, target)
        one, two = self.learned(output, target.first), self.learned(output, target.second)
        share = target.share.to(one)
        return share * one + (1 - share) * two

    def count(self, target: Any) -> Tensor:
        """`positions` of any target."""
        return self.count(target.target) if isinstance(target, Weighted) else self.positions(target)

    def per_sample(self, output: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Loss and correctness of each sample, [B] each; correctness is 0 where there is none."""
        scores = self.scored(output, target)
        return scores.loss, torch.zeros_like(scores.loss) if scores.correct is None else scores.correct

    def rows(self, scores: Scores) -> Tensor | None:
        """The further sums of a batch, [B, C] in the order of ``columns``; None without any.

        Raises:
            ConfigError: names or shapes are not those that the task has declared.
        """
        if set(scores.sums) != set(self.columns):
            raise ConfigError(
                f"task {self.name}: score returns the sums {', '.join(sorted(scores.sums)) or 'none'}, declared are "
                f"{', '.join(sorted(self.columns)) or 'none'}; name the same in Task.columns"
            )
        for name, column in scores.sums.items():
            if column.shape != scores.loss.shape:
                raise ConfigError(
                    f"task {self.name}: the sum {name} is {list(column.shape)}, need one number for each of "
                    f"{list(scores.loss.shape)} samples"
                )
        return torch.stack([scores.sums[name].detach() for name in self.columns], 1) if self.columns else None

    def info(self, objective: str | None = None) -> TaskInfo:
        """Names, units and directions.

        Args:
            objective: ``validation_<name>``; None for the task's own.

        Raises:
            ConfigError: there is no such metric.
        """
        info = TaskInfo(
            name=self.name,
            unit=self.unit,
            objective=objective or f"validation_{self.objective}",
            higher=False,
            graded=self.graded,
            metrics=tuple(metric.info for metric in self.metrics),
            evidence="sample" if self.group == 1 else f"group of {self.group}",
        )
        higher = info.direction(info.objective)
        if higher is None:
            names = ["loss", *(["accuracy"] if self.graded else []), *(metric.name for metric in info.metrics)]
            raise ConfigError(
                f"trainer.objective = {info.objective!r}: the task {self.name} has no such metric; it has "
                f"{', '.join(f'validation_{name}' for name in names)}"
            )
        return replace(info, higher=higher)

    def values(self, sums: Sums) -> dict[str, float]:
        """The metrics that have a value, by name, from sums over all samples.

        Raises:
            ConfigError: a metric is not finite, or cannot be computed.
        """
        found = {}
        for metric in self.metrics:
            name = metric.info.name
            try:
                found[name] = value = metric.value(sums)
            except Exception as error:
                raise ConfigError(
                    f"task {self.name}: the metric {name}, over {sums['count']:.0f} samples: {one_line(error)}; "
                    "correct it, or return None where it has no value"
                ) from error
            if value is not None and not math.isfinite(value):
                raise ConfigError(
                    f"task {self.name}: the metric {name} is {value} over {sums['count']:.0f} samples; return None "
                    "where it has no value"
                )
        return {name: float(value) for name, value in found.items() if value is not None}

    def check(self, output: Any, target: Any, samples: int) -> None:
        """Checks what the task makes of a model's first output.

        Args:
            output: of ``samples`` samples.
            target: theirs.
            samples: how many.

        Raises:
            ConfigError: it is not one loss per sample.
        """
        try:
            scores = self.scored(output, target)
            learned = self.learned(output, target) if self.learns_otherwise else scores.loss
        except (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"task {self.name}: {type(error).__name__}: {text}; do host and data fit it?") from None
        for what, value in (("score", scores.loss), ("learn", learned), ("correct", scores.correct)):
            if what != "correct" or value is not None or self.graded:
                self.one_each(value, samples, what)
        self.rows(scores)

    def one_each(self, value: Any, samples: int, what: str = "score") -> None:
        """Checks that there is a number for each sample; a task of the user's own may make something else at any batch.

        Raises:
            ConfigError: there is not.
        """
        if isinstance(value, Tensor) and value.shape == (samples,):
            return
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        hint = ": not their mean" if isinstance(value, Tensor) and value.ndim == 0 else ""
        raise ConfigError(
            f"task {self.name}: {what} is {got} for {samples} samples, need one number for each, [{samples}]{hint}"
            "; correct Task.score (reduction='none')"
        )


def read_logits(output: Any, name: str) -> Tensor:
    """The one tensor of an output that counts: itself, ``logits`` of a mapping, dataclass or ModelOutput, or the first.

    Raises:
        ConfigError: there is none.
    """
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "output", "prediction"):
        found = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(found, Tensor):
            return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise ConfigError(
        f"task {name}: the host returns {type(output).__name__}, expected a tensor, or logits in a mapping, a "
        "dataclass or a ModelOutput; write a task of your own (task=custom)"
    )
