"""The summary at the end of a run: accuracy before and after growth, the seeds that grew, the folder, next commands.

The worker fills a `RunSummary`. It is plain data (`to_plain` and back), so ``RunEnded.summary`` can carry it and
another process can show it.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from esper.leyline.events.task import OF_SESSION, TaskInfo
from esper.leyline.evidence import ABSENT, Reading, Status
from esper.leyline.plain import from_plain
from esper.leyline.stages import Stage
from esper.nissa.screen import safe


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The network at one moment.

    Fields:
        step: optimizer steps done.
        parameters: parameters of the whole network.
        loss: validation loss, in the task's unit per sample.
        accuracy: share of correct validation predictions.
        metrics: the task's further metrics of validation, by name.
    """

    step: int
    parameters: int
    loss: Reading
    accuracy: Reading
    metrics: dict[str, Reading] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GrownSeed:
    """A seed that is in the network at the end.

    Fields:
        slot: slot of the seed.
        blueprint: blueprint of the seed.
        stage: stage of the slot.
        alpha: alpha of the slot.
        parameters: parameters that the seed added.
        contribution: paired loss without minus with the seed, nats per sample; positive helps.
        reason: why the seed is there, in a few words.
        shapley: its share of what all seeds save on the validation part, nats per sample.
    """

    slot: str
    blueprint: str
    stage: Stage
    alpha: float
    parameters: int
    contribution: Reading
    reason: str
    shapley: Reading = ABSENT


@dataclass(frozen=True, slots=True, kw_only=True)
class PrunedSeeds:
    """Seeds of one blueprint that were removed from one slot for one reason, ``count`` times."""

    slot: str
    blueprint: str
    reason: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryTotals:
    """Totals of the seed library in a run, on rank 0.

    Fields:
        births: seeds that were requested.
        memory_hits: seeds that were in memory.
        disk_hits: seeds that were on disk.
        built: seeds that had to be built.
        failed: seeds that could not be built.
        evicted: seeds that were dropped from memory.
        waited_ms: milliseconds for which ticks waited for the library, in total.
    """

    births: int
    memory_hits: int
    disk_hits: int
    built: int
    failed: int
    evicted: int
    waited_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NextCommand:
    """A command to type, and its purpose."""

    command: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run in a few numbers.

    Fields:
        status: status as in STATUS.json.
        ticks: control ticks done.
        world_size: number of ranks.
        wall_s: seconds of this attempt.
        start: seconds of each phase of its start, up to the first optimizer step.
        before: the network at the last validation before a seed first took part in the host's forward pass.
        after: the network at the end.
        grown: seeds in the network now, row-major.
        pruned: seeds that were pruned, counted.
        library: totals of the seed library; None without one, or if telemetry.level keeps no record of it.
        run_dir: folder of the run, as the user named it.
        next_commands: commands to type next.
        task: names, units and directions of what was learned.
    """

    status: str
    ticks: int
    world_size: int
    wall_s: float
    start: dict[str, float]
    before: Score
    after: Score
    grown: tuple[GrownSeed, ...]
    pruned: tuple[PrunedSeeds, ...]
    library: LibraryTotals | None
    run_dir: str
    next_commands: tuple[NextCommand, ...]
    task: TaskInfo = OF_SESSION


def _percent(reading: Reading) -> str:
    if reading.value is None:
        return "absent"
    error = "" if reading.se is None else f" ± {reading.se * 100:.1f}"
    return f"{reading.value * 100:.1f}{error} %{_age(reading)}"


def _nats(reading: Reading, places: int = 3) -> str:
    if reading.value is None:
        return "absent"
    error = "" if reading.se is None else f" ± {reading.se:.{places}f}"
    return f"{reading.value:.{places}f}{error}{_age(reading)}"


def _age(reading: Reading) -> str:
    return f" (tick {reading.tick})" if reading.status is Status.STALE else ""


def _change(before: Reading, after: Reading, scale: float, places: int, unit: str, up_is_good: bool) -> Text:
    if before.value is None or after.value is None:
        return Text("absent", "dim")
    change = (after.value - before.value) * scale
    good = change > 0 if up_is_good else change < 0
    style = "green" if good else "red" if change else ""
    return Text(f"{change:+.{places}f}{unit}", style)


def _scores(summary: RunSummary) -> Table:
    before, after = summary.before, summary.after
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for title in (f"before growth, step {before.step:,}", f"at the end, step {after.step:,}", "change"):
        table.add_column(title, justify="right")
    task = summary.task
    if task.graded:
        accuracy = _change(before.accuracy, after.accuracy, 100.0, 1, " points", up_is_good=True)
        table.add_row("validation accuracy", _percent(before.accuracy), _percent(after.accuracy), accuracy)
    for metric in task.metrics:
        one, two = (score.metrics.get(metric.name, ABSENT) for score in (before, after))
        share = metric.unit == "share"
        unit, scale, places = (" points", 100.0, 1) if share else (f" {metric.unit}".rstrip(), 1.0, 4)
        change = _change(one, two, scale, places, unit, up_is_good=metric.higher)
        cells = ("absent" if each.value is None else metric.show(each.value) for each in (one, two))
        table.add_row(f"validation {metric.name}", *cells, change)
    loss = _change(before.loss, after.loss, 1.0, 3, f" {task.unit}".rstrip(), up_is_good=False)
    table.add_row("validation loss", _nats(before.loss), _nats(after.loss), loss)
    added = after.parameters - before.parameters
    rate = f" ({added / before.parameters:+.1%})" if before.parameters else ""
    table.add_row("parameters", f"{before.parameters:,}", f"{after.parameters:,}", f"{added:+,}{rate}")
    return table


def _growth(summary: RunSummary) -> RenderableType:
    if not summary.grown and not summary.pruned:
        return Text("Nothing grew.\n")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("slot", no_wrap=True)
    table.add_column("blueprint", no_wrap=True)
    table.add_column("stage", no_wrap=True)
    table.add_column("parameters", justify="right", no_wrap=True)
    table.add_column("newest look", justify="right", no_wrap=True)
    shared = any(seed.shapley.value is not None for seed in summary.grown)
    if shared:
        table.add_column("Shapley share", justify="right", no_wrap=True)
    table.add_column("why", ratio=1)
    for seed in summary.grown:
        stage = seed.stage.name if seed.alpha == 1.0 else f"{seed.stage.name} at {seed.alpha:.2f}"
        worth = _nats(seed.contribution, 4)
        names = Text(seed.slot), Text(seed.blueprint), Text(stage, "green")
        share = [_nats(seed.shapley, 4)] if shared else []
        table.add_row(*names, f"+{seed.parameters:,}", worth, *share, Text(seed.reason))
    for gone in summary.pruned:
        times = "pruned" if gone.count == 1 else f"pruned {gone.count} times"
        cells = (gone.slot, gone.blueprint, times, "0", "", *([""] if shared else []))
        table.add_row(*(Text(cell, "dim") for cell in cells), Text(gone.reason, "dim"))
    return table


def _library(totals: LibraryTotals) -> Text:
    return Text(
        f"library  {totals.births} births: {totals.memory_hits} from memory, {totals.disk_hits} from disk, "
        f"{totals.built} built, {totals.failed} failed; {totals.evicted} evicted; "
        f"ticks waited {totals.waited_ms:.1f} ms\n",
        "dim",
    )


def _head(summary: RunSummary) -> Text:
    minutes, seconds = divmod(round(summary.wall_s), 60)
    ranks = "1 rank" if summary.world_size == 1 else f"{summary.world_size} ranks"
    style = "bold green" if summary.status == "done" else "bold red"
    clock = f"{summary.after.step:,} steps, {summary.ticks:,} ticks, {ranks}, {minutes}:{seconds:02d} min"
    return Text.assemble((f"Run {summary.status}", style), f" · {clock}")


def _start(seconds: dict[str, float]) -> Text:
    """How long the start took, the longest phases first."""
    longest = sorted(seconds.items(), key=lambda item: -item[1])
    phases = ", ".join(f"{name} {length:.1f}" for name, length in longest if length >= 0.05)
    return Text(f"start  {sum(seconds.values()):.1f} s to the first step: {phases}\n", "dim")


def _where(summary: RunSummary) -> Text:
    lines = Text.assemble(("run   ", "bold"), summary.run_dir)
    width = max((len(entry.command) for entry in summary.next_commands), default=0)
    for index, entry in enumerate(summary.next_commands):
        lines.append("\nnext  " if index == 0 else "\n      ", "bold")
        lines.append(entry.command.ljust(width), "cyan")
        lines.append(f"  {entry.what}", "dim")
    return lines


def print_summary(summary: RunSummary | dict[str, Any], console: Console | None = None) -> None:
    """Prints the closing table.

    Args:
        summary: the summary, or its plain form.
        console: console to print to; by default stdout, 100 columns wide unless it is a terminal.

    Raises:
        ValueError: the plain form has a missing or unknown field; the text names it.
    """
    if isinstance(summary, dict):
        summary = from_plain(RunSummary, summary)
    if console is None:
        out = safe(sys.stdout)
        console = Console(file=out, highlight=False)
        if not console.is_terminal:
            console = Console(file=out, highlight=False, width=100)
    console.print(Group(Text(), _head(summary), _scores(summary), _growth(summary)), highlight=False)
    if summary.library is not None:
        console.print(_library(summary.library), highlight=False)
    if summary.start:
        console.print(_start(summary.start), highlight=False, soft_wrap=True)
    console.print(_where(summary), highlight=False, soft_wrap=True)  # paths and commands stay whole, to copy
