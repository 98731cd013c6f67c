"""The record of a finished run for comparisons: its curve over training FLOPs, its final numbers, its stages.

Everything comes from the run directory (events.jsonl, result.json); nothing is measured again. A curve holds the ticks
at which validation was measured; of ticks that several attempts have made, the newest counts. A run whose record is
damaged or has holes is refused: a missing tick may have been the best one.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from esper.leyline.errors import RunDirError, one_line
from esper.leyline.events.task import OF_SESSION, TaskInfo
from esper.leyline.files import RunDir
from esper.leyline.plain import from_plain
from esper.nissa.reading import Record, keep_latest, read_events


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One tick at which validation was measured.

    Fields:
        step: optimizer steps done.
        flops: training FLOPs spent.
        parameters: of the network at that tick.
        loss: validation loss per sample, in the unit of the task.
        accuracy: validation accuracy, share of correct predictions; NaN where the task knows no right or wrong.
        metrics: further validation metrics of the task by name, such as loss_old.
    """

    step: int
    flops: int
    parameters: int
    loss: float
    accuracy: float
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLine:
    """A stage change.

    Fields:
        tick: of the change.
        slot: that changed.
        target: the new stage, by name.
        blueprint: of the slot's seed; None without one.
    """

    tick: int
    slot: str
    target: str
    blueprint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One finished run.

    Fields:
        folder: the run directory.
        curve: the ticks at which validation was measured, in order.
        flops: training FLOPs in all.
        samples: training samples in all.
        steps: optimizer steps in all.
        ticks: ticks in all.
        parameters: at the end.
        final_loss: validation loss at the end, per sample, in the unit of the task.
        final_accuracy: validation accuracy at the end, a share; NaN where the task knows no right or wrong.
        test_loss: of the checkpoint that validation chose, measured once.
        test_accuracy: of the same checkpoint.
        task: names, units and directions of what it learned.
        final_metrics: the task's own metrics of validation at the end.
        test_metrics: those of the test part, of the same checkpoint as its loss.
        stages: stage changes, in order.
        wall_s: seconds from the first event to the last, over all attempts.
    """

    folder: str
    curve: tuple[Point, ...]
    flops: int
    samples: int
    steps: int
    ticks: int
    parameters: int
    final_loss: float
    final_accuracy: float
    test_loss: float
    test_accuracy: float
    task: TaskInfo
    final_metrics: dict[str, float]
    test_metrics: dict[str, float]
    stages: tuple[StageLine, ...]
    wall_s: float

    @property
    def best_loss(self) -> float:
        """Lowest validation loss of the curve."""
        return min(point.loss for point in self.curve)

    @property
    def best_accuracy(self) -> float:
        """Highest validation accuracy of the curve."""
        return max(point.accuracy for point in self.curve)

    def loss_at(self, flops: float) -> float | None:
        """Lowest validation loss within ``flops``, linear between ticks; None outside the curve.

        The lowest, not the last: at equal compute one would keep the best checkpoint.
        """
        if flops < self.curve[0].flops or flops > self.curve[-1].flops:
            return None
        best = math.inf
        for before, after in zip((self.curve[0], *self.curve), self.curve):
            if after.flops <= flops:
                best = min(best, after.loss)
                continue
            share = (flops - before.flops) / (after.flops - before.flops)
            return min(best, before.loss + share * (after.loss - before.loss))
        return best

    def flops_to(self, loss: float) -> float | None:
        """FLOPs until validation loss first reached ``loss``, linear between ticks; None if it never did."""
        for before, after in zip((self.curve[0], *self.curve), self.curve):
            if after.loss <= loss:
                if before.loss <= loss or before is after:
                    return float(after.flops if before is after else before.flops)
                share = (before.loss - loss) / (before.loss - after.loss)
                return before.flops + share * (after.flops - before.flops)
        return None


def _field(plain: Any, name: str, *kinds: type) -> Any:
    """A field of plain data; a ValueError says what it is instead."""
    if not isinstance(plain, dict):
        raise ValueError(f"{plain!r:.60} where an object with {name} was expected")
    if name not in plain:
        raise ValueError(f"{name} is missing")
    value = plain[name]
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name} is {value!r:.60}")
    return value


def _number(plain: Any, name: str) -> float:
    value = float(_field(plain, name, int, float))
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}")
    return value


def _accuracy(result: Any, where: Path, name: str) -> float:
    """A reading of an accuracy; NaN where the run's task knows no right or wrong."""
    graded = result.get("task", {}).get("graded", True)
    return _reading(result, where, name) if graded else math.nan


def _reading(result: Any, where: Path, name: str) -> float:
    value = _field(_field(result, name, dict), "value", int, float, str, type(None))
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RunDirError(f"{where}: {name} was not measured ({value!r}); this run cannot be compared")
    return float(value)


def _point(record: Record) -> Point | None:
    """The point of a tick; None if validation was not measured at it, or the run keeps no account of FLOPs."""
    payload = record["payload"]
    loss, accuracy = (_field(payload, name, dict) for name in ("validation_loss", "validation_accuracy"))
    fresh = _field(loss, "tick", int, type(None)) == record["tick"]
    flops = _field(payload, "flops", int, type(None))
    if flops is None or not fresh or _field(loss, "value", int, float, type(None)) is None:
        return None
    return Point(
        step=_field(record, "step", int),
        flops=flops,
        parameters=_field(payload, "parameters", int),
        loss=_number(loss, "value"),
        accuracy=math.nan if _field(accuracy, "value", int, float, type(None)) is None else _number(accuracy, "value"),
        metrics={
            name.removeprefix("validation_"): _number(reading, "value")
            for name, reading in payload.get("metrics", {}).items()
            if name.startswith("validation_") and _field(reading, "tick", int, type(None)) == record["tick"]
        },
    )


def _stage(record: Record) -> StageLine:
    payload = record["payload"]
    return StageLine(
        tick=_field(record, "tick", int),
        slot=_field(payload, "slot", str),
        target=_field(payload, "target", str),
        blueprint=_field(payload, "blueprint", str, type(None)),
    )


def _check_whole(records: list[Record], ticks: list[int], validated: int, result: Any) -> None:
    """Raises ValueError if ticks are missing: sinks are flushed before every save, so no kill or rollback loses any.

    Args:
        records: the run's events.
        ticks: the ticks that have an event.
        validated: the last tick of the curve.
        result: the content of result.json.
    """
    last = _field(result, "tick", int)
    missing = sorted(set(range(1, last + 1)) - set(ticks))
    if missing:
        faults = [record["payload"] for record in records if record["kind"] == "fault"]
        texts = [_field(fault, "what", str) for fault in faults if _field(fault, "where", str).startswith("telemetry")]
        why = f"; the run said: {texts[-1]}" if texts else ""
        raise ValueError(f"{len(missing)} of {last} ticks are missing, the first is {missing[0]}{why}")
    last_validated = _field(_field(result, "validation_loss", dict), "tick", int)
    if validated != last_validated:
        raise ValueError(f"the last validated tick is {validated}, in result.json it is {last_validated}")


def read_run(folder: Path) -> RunRecord:
    """Reads a finished run.

    Raises:
        RunDirError: the run is not finished, its record is damaged or has holes, it keeps no account of FLOPs, or it
            has no events of its ticks (which needs telemetry.level=full).
    """
    path, events = RunDir(folder).result, RunDir(folder).events
    mend = f"remove {folder}, and the same command runs it again"
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: not readable ({error}); if this run has finished, {mend}") from None
    try:
        records = keep_latest(read_events(events))
    except RunDirError as error:
        raise RunDirError(f"{error}; or {mend}") from None
    except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunDirError(f"{events}: damaged: {one_line(error)}; {mend}") from None
    source = events
    try:
        points = {record["tick"]: _point(record) for record in records if record["kind"] == "tick"}
        curve = {tick: point for tick, point in points.items() if point is not None}
        stages = tuple(_stage(record) for record in records if record["kind"] == "stage")
        times = [_number(record, "time") for record in records]
        source = path
        if not curve or _field(result, "flops", int, type(None)) is None:
            raise RunDirError(f"{folder}: no validated ticks with FLOPs in events.jsonl; run with telemetry.level=full")
        run = RunRecord(
            folder=str(folder),
            curve=tuple(curve.values()),
            flops=_field(result, "flops", int),
            samples=_field(result, "samples", int),
            steps=_field(result, "step", int),
            ticks=_field(result, "tick", int),
            parameters=_field(result, "parameters", int),
            final_loss=_reading(result, path, "validation_loss"),
            final_accuracy=_accuracy(result, path, "validation_accuracy"),
            test_loss=_reading(result, path, "test_loss"),
            test_accuracy=_accuracy(result, path, "test_accuracy"),
            task=from_plain(TaskInfo, result["task"], "task") if "task" in result else OF_SESSION,
            final_metrics=result.get("validation_metrics", {}),
            test_metrics=result.get("test_metrics", {}),
            stages=stages,
            wall_s=max(times) - min(times),
        )
        source = events
        _check_whole(records, list(points), list(curve)[-1], result)
    except (AttributeError, TypeError, ValueError) as error:
        raise RunDirError(f"{source}: damaged: {error}; {mend}") from None
    return run
