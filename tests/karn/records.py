"""Run records with known curves."""

from esper.karn.runs import Point, RunRecord, StageLine
from esper.leyline.events.task import OF_SESSION, TaskInfo


def curve(*points: tuple[int, float]) -> tuple[Point, ...]:
    """Points of (FLOPs, validation loss)."""
    return tuple(
        Point(step=i + 1, flops=flops, parameters=100, loss=loss, accuracy=1 / (1 + loss))
        for i, (flops, loss) in enumerate(points)
    )


def record(
    points,
    *,
    accuracy: float = 0.5,
    test_loss: float = 1.0,
    parameters: int = 100,
    stages=(),
    task: TaskInfo = OF_SESSION,
    metrics: dict[str, float] | None = None,
) -> RunRecord:
    """A finished run that ended where its curve ends."""
    path = curve(*points)
    lines = tuple(StageLine(tick=t, slot=s, target=g, blueprint="norm") for t, s, g in stages)
    return RunRecord(
        folder="RUN",
        curve=path,
        flops=path[-1].flops,
        samples=10,
        steps=len(path),
        ticks=10,
        parameters=parameters,
        final_loss=path[-1].loss,
        final_accuracy=path[-1].accuracy,
        test_loss=test_loss,
        test_accuracy=accuracy,
        task=task,
        final_metrics=metrics or {},
        test_metrics=metrics or {},
        stages=lines,
        wall_s=1.0,
    )
