"""Classification of samples or tokens in data of two phases, with the losses of old and new samples apart."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from esper.leyline.errors import ConfigError
from esper.leyline.events.task import MetricInfo
from esper.tolaria.data.parts import Bundle
from esper.tolaria.data.task import Task as Labels
from esper.tolaria.tasks.configs import OfDataConfig
from esper.tolaria.tasks.labels import LabelTask
from esper.tolaria.tasks.task import Metric, Scores, Sums, Task


def _mean_of(phase: str) -> Metric:
    """Mean loss of the old samples or of the new ones; no value where there are none."""

    def value(sums: Sums) -> float | None:
        count = sums["new"] if phase == "new" else sums["count"] - sums["new"]
        return sums[f"loss_{phase}"] / count if count > 0 else None

    return Metric(MetricInfo(name=f"loss_{phase}", unit="nats", higher=False), value)


class PhasedTask(LabelTask):
    """`LabelTask` on targets that say which samples are new: (target, whether new, bool [B]).

    Args:
        kind: what the logits are.
    """

    def __init__(self, kind: Labels) -> None:
        super().__init__(kind)
        self.columns = ["new", "loss_old", "loss_new"]
        self.metrics = [_mean_of("old"), _mean_of("new")]

    def score(self, output: Any, target: Any) -> Scores:
        """Cross-entropy in nats, and what is right; apart for old and new."""
        said, new = target
        scores = super().score(output, said)
        is_new = new.to(scores.loss)
        sums = {"new": is_new, "loss_old": scores.loss * (1 - is_new), "loss_new": scores.loss * is_new}
        return Scores(scores.loss, scores.correct, sums)

    def chance(self, targets: Iterable[Any]) -> float:
        """Entropy of the targets' frequencies."""
        return super().chance(said for said, _ in targets)

    def learn(self, output: Any, target: Any) -> Tensor:
        """The loss of all samples."""
        return self.score(output, target).loss

    @property
    def learns_otherwise(self) -> bool:
        """What is trained is what is reported."""
        return False


def build_of_data(config: OfDataConfig, bundle: Bundle) -> Task:
    """The task that the data set is made for."""
    if bundle.task is None:
        raise ConfigError(f"task.kind = 'data': data={bundle.name} may serve any task; name one, as task=regression")
    return PhasedTask(bundle.task) if bundle.phased else LabelTask(bundle.task)
