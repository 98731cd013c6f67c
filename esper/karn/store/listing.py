"""The table of `esper runs`: every run below a folder, the newest last."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from esper.karn.store.digest import read_digest
from esper.karn.store.facts import RunFacts, collect_facts
from esper.karn.store.finding import find_runs
from esper.leyline.errors import RunDirError, one_line

STYLES = {
    "running": "cyan",
    "done": "green",
    "preempted": "yellow",
    "failed": "bold red",
    "diverged": "bold red",
    "lost": "red",
    "prepared": "dim",
}


def list_runs(root: Path) -> tuple[list[RunFacts], list[str]]:
    """Collects the facts of every run below a folder.

    Returns:
        The facts, in order of their start; a line for each thing that was passed over, or that cannot be read.

    Raises:
        RunDirError: there is no such folder.
    """
    found = find_runs(root)
    facts, notes = [], list(found.skipped)
    for run in found.runs:
        try:
            facts.append(collect_facts(run, read_digest(run)))
        except RunDirError as error:
            notes.append(f"left out: {one_line(error)}")
    return sorted(facts, key=lambda row: (row.started or 0.0, row.run)), notes


def visible(text: str) -> str:
    """Text without control characters, so that no record can steer the terminal that shows it."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def shorten(text: str, width: int = 90) -> str:
    """The beginning of a text, without what stands in parentheses if that would not fit."""
    if len(text) > width:
        text = text.split(" (")[0]
    return text if len(text) <= width else text[: width - 1] + "…"


def short_count(number: float | None, unit: str = "") -> str:
    """A large number with three digits and a prefix: 1.51 G; a dash for None."""
    if number is None:
        return "–"
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}".rstrip()


def _hours(hours: float | None) -> str:
    return "–" if hours is None else f"{hours:.1f} rank h" if hours >= 0.1 else f"{hours * 60:.1f} rank min"


def _slots(row: RunFacts) -> str:
    if row.slots is None:
        return "–"
    return f"{row.fossils} kept, {row.live_seeds} alive of {row.slots}"


def _loss(row: RunFacts) -> str:
    value = row.validation_loss if row.validation_loss is not None else row.train_loss
    return "–" if value is None else f"{value:.4g}"


def runs_table(rows: Sequence[RunFacts]) -> Table:
    """The rows as a table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head, right in (("run", False), ("state", False), ("step", True), ("loss", True), ("slots", False)):
        table.add_column(head, justify="right" if right else "left", no_wrap=head != "slots")
    table.add_column("cost", justify="right")
    table.add_column("last word", overflow="fold", ratio=1)
    for row in rows:
        step = "–" if row.step is None else f"{row.step:,}"
        total = f"/{row.total_steps:,}" if row.total_steps else ""
        cells = [step + total, _loss(row), _slots(row), f"{short_count(row.flops, 'FLOP')}, {_hours(row.rank_hours)}"]
        name, word = Text(visible(row.run), overflow="fold"), Text(visible(shorten(row.last_word)))
        table.add_row(name, Text(row.state, STYLES.get(row.state, "")), *map(Text, cells), word)
    return table
