"""A finished run as a table reads it: its curve over training FLOPs, its end, its stages.

Everything comes from the run directory (events.jsonl, result.json); nothing is measured again. Curves hold the ticks at
which validation was read; where an attempt was repeated, the newest one counts.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.leyline.errors import RunDirError
from esper.nissa.reading import latest, read_events


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One validated tick.

    Fields:
        step: optimizer steps done. flops: training FLOPs spent. parameters: of the network then.
        loss: validation, nats per sample. accuracy: validation, share of correct predictions.
    """

    step: int
    flops: int
    parameters: int
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLine:
    """A stage change: at which tick which slot went where, with which blueprint."""

    tick: int
    slot: str
    target: str
    blueprint: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One finished run.

    Fields:
        folder: where it lies. curve: validated ticks, in order.
        flops, samples, steps, ticks, parameters: at the end.
        final_loss, final_accuracy: validation at the end.
        best_accuracy: of the checkpoint that validation chose, None if none was scored.
        test_loss, test_accuracy: of that checkpoint, read once.
        stages: stage changes, in order. wall_s: from the first event to the last, over all attempts.
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
        """Validation loss when the account stood at ``flops``, linear between ticks; None beyond the run's end.

        The lowest loss reached by then: at equal compute one would keep the best checkpoint.
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
        """FLOPs when validation loss first came down to ``loss``, linear between ticks; None if it never did."""
        for before, after in zip((self.curve[0], *self.curve), self.curve):
            if after.loss <= loss:
                if before.loss <= loss or before is after:
                    return float(after.flops if before is after else before.flops)
                share = (before.loss - loss) / (before.loss - after.loss)
                return before.flops + share * (after.flops - before.flops)
        return None


def _reading(reading: dict[str, Any], where: Path, name: str) -> float:
    value = reading.get("value")
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise RunDirError(f"{where}: {name} was not measured ({value!r}); this run cannot be compared")
    return float(value)


def read_run(folder: Path) -> RunRecord:
    """Reads a finished run.

    Raises:
        RunDirError: it is not finished, keeps no account of FLOPs, or told nothing of its ticks (telemetry.level=full).
    """
    path = folder / "result.json"
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunDirError(f"{path}: not readable ({error}); a run that has finished holds one") from None
    records = latest(read_events(folder / "events.jsonl"))
    curve = []
    for record in records:
        if record["kind"] != "tick":
            continue
        payload = record["payload"]
        loss, accuracy = payload["validation_loss"], payload["validation_accuracy"]
        if loss["value"] is None or loss["tick"] != record["tick"] or payload["flops"] is None:
            continue
        curve.append(
            Point(
                step=record["step"], flops=payload["flops"], parameters=payload["parameters"], loss=loss["value"],
                accuracy=accuracy["value"],
            )
        )  # fmt: skip
    if not curve or result.get("flops") is None:
        raise RunDirError(f"{folder}: no validated ticks with FLOPs in events.jsonl; run with telemetry.level=full")
    stages = tuple(
        StageLine(
            tick=record["tick"], slot=record["payload"]["slot"], target=record["payload"]["target"],
            blueprint=record["payload"]["blueprint"],
        )
        for record in records
        if record["kind"] == "stage"
    )  # fmt: skip
    times = [record["time"] for record in records]
    return RunRecord(
        folder=str(folder), curve=tuple(curve), flops=result["flops"], samples=result["samples"],
        steps=result["step"], ticks=result["tick"],
        parameters=result["parameters"], final_loss=_reading(result["validation_loss"], path, "validation_loss"),
        final_accuracy=_reading(result["validation_accuracy"], path, "validation_accuracy"),
        test_loss=_reading(result["test_loss"], path, "test_loss"),
        test_accuracy=_reading(result["test_accuracy"], path, "test_accuracy"), stages=stages,
        wall_s=max(times) - min(times),
    )  # fmt: skip
