"""Figures that know where they come from, so that a reader, or a test, can look each one up in the record.

A figure is shown as ``<span data-from="events.jsonl 1 76 validation_loss.value" data-format=".4g">0.7654</span>``: the
file, and of an event its attempt, its number and the path in its payload; of another file the path. A rate has besides
``data-over="steps_ms tick_ms" data-times="1000"``: the figure of that path over the sum of these, times so much.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from esper.nissa.reading import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of the record.

    Fields:
        value: the number; None where it was not measured.
        source: where it stands.
        over: paths in the same payload whose sum it was divided by; empty: by none.
        times: factor on a figure that was divided.
    """

    value: float | None
    source: str
    over: tuple[str, ...] = ()
    times: float = 1.0

    def show(self, form: str = ".4g", scale: float = 1.0) -> str:
        """The figure as HTML; a dash for None.

        Args:
            form: format specification.
            scale: factor on the number that is shown.
        """
        if self.value is None:
            return "–"
        text = html.escape(format(self.value * scale, form))
        scaled = "" if scale == 1.0 else f' data-scale="{scale:g}"'
        rate = f' data-over="{" ".join(self.over)}" data-times="{self.times!r}"' if self.over else ""
        return f'<span data-from="{html.escape(self.source)}" data-format="{form}"{scaled}{rate}>{text}</span>'


HELD = 400  # points of a line that are held at least, where there are so many


@dataclass(slots=True, kw_only=True)
class Series:
    """One line of a plot.

    Fields:
        name: of the line.
        steps: optimizer steps, the x axis.
        values: figures, one per step.
        errors: standard errors, where they were measured; empty: none.
    """

    name: str
    steps: list[int] = field(default_factory=list)
    values: list[Figure] = field(default_factory=list)
    errors: list[Figure] = field(default_factory=list)
    _stride: int = 1
    _added: int = 0

    def add(self, step: int, value: Figure, error: Figure | None = None) -> None:
        """Adds a point; one without a value is left out. Of many points evenly chosen ones are held, and the newest."""
        if value.value is None:
            return
        if self._added and (self._added - 1) % self._stride:
            self._let_go(slice(-1, None))
        self.steps.append(step)
        self.values.append(value)
        if error is not None:
            self.errors.append(error)
        self._added += 1
        if len(self.steps) > 2 * HELD and len(self.steps) % 2:
            self._let_go(slice(1, None, 2))
            self._stride *= 2

    def _let_go(self, points: slice) -> None:
        for held in (self.steps, self.values, self.errors):
            del held[points]

    @property
    def numbers(self) -> list[float]:
        """The values as plain numbers."""
        return [figure.value for figure in self.values if figure.value is not None]

    def thinned(self, most: int) -> "Series":
        """Every so manieth point, so that at most ``most`` are left; the last one stays."""
        if len(self.steps) <= most:
            return self
        stride = -(-len(self.steps) // most)
        kept = sorted({*range(0, len(self.steps), stride), len(self.steps) - 1})
        errors = [self.errors[i] for i in kept] if self.errors else []
        return Series(
            name=self.name, steps=[self.steps[i] for i in kept], values=[self.values[i] for i in kept], errors=errors
        )


def from_event(record: Record, *path: str, file: str = "events.jsonl") -> Figure:
    """A number of an event's payload.

    Args:
        record: the event.
        path: names, from the payload down.
        file: the event file.
    """
    value: Any = record["payload"]
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    source = f"{file} {record['attempt']} {record['seq']} {'.'.join(path)}"
    return Figure(value=None if value is None else float(value), source=source)


def rate_of(record: Record, path: str, over: Sequence[str], times: float) -> Figure:
    """A number of an event's payload over the sum of others, times a factor; None if one is missing or the sum is 0."""
    whole = from_event(record, path)
    parts = [from_event(record, name).value for name in over]
    total = math.fsum(part for part in parts if part is not None)
    known = whole.value is not None and None not in parts and total > 0
    value = whole.value / total * times if known and whole.value is not None else None
    return Figure(value=value, source=whole.source, over=tuple(over), times=times)


def from_file(name: str, content: dict[str, Any], *path: str) -> Figure:
    """A number of a JSON file of the run directory."""
    value: Any = content
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    return Figure(value=None if value is None else float(value), source=f"{name} {'.'.join(path)}")


def any_point(series: Sequence[Series]) -> bool:
    """Whether there is anything to plot."""
    return any(line.steps for line in series)
