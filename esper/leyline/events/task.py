"""What a task says of its numbers: names, units and directions, for whoever shows, compares or chooses by them."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricInfo:
    """One metric of a task."""

    name: str
    """Its name, such as mean_iou."""

    unit: str = ""
    """Its unit; ``share`` for 0 to 1, shown in percent; empty: a plain number."""

    higher: bool = True
    """Whether higher is better."""

    def show(self, value: float) -> str:
        """The value as it is shown to people."""
        return f"{value:.1%}" if self.unit == "share" else f"{value:.4g} {self.unit}".rstrip()


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskInfo:
    """What a run learns."""

    name: str
    """Name of the task."""

    unit: str
    """Unit of the loss per sample."""

    objective: str
    """What a sweep optimises and what chooses the best checkpoint, as ``validation_loss``."""

    higher: bool
    """Whether a higher objective is better."""

    graded: bool
    """Whether its answers are right or wrong, so that there is an accuracy."""

    metrics: tuple[MetricInfo, ...] = ()
    """Its metrics beside loss and accuracy."""

    evidence: str = "sample"
    """What counts as one piece of evidence: ``sample`` (or its cluster), or ``group of N`` samples."""

    def direction(self, objective: str) -> bool | None:
        """Whether higher is better for ``validation_<name>``; None if the task has no such metric."""
        known = {f"validation_{metric.name}": metric.higher for metric in self.metrics}
        known["validation_loss"] = False
        if self.graded:
            known["validation_accuracy"] = True
        return known.get(objective)


OF_SESSION = TaskInfo(name="session", unit="nats", objective="validation_loss", higher=False, graded=True)
