"""A comparison as one self-contained HTML file: tables, verdicts, three plots. Needs matplotlib (extra ``report``).

loss against FLOPs        median over seeds, the range between the quartiles shaded, log FLOPs
parameters, test metric    one point per run
stages                    the stage of each slot over ticks, for the first seed of each arm that grows
"""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esper.karn.comparison import Comparison
from esper.karn.html import INK, STAGE_COLOURS, legend_above, matplotlib, new_figure, page, plot, table
from esper.karn.rows import Metric, Runs
from esper.karn.runs import RunRecord
from esper.karn.table import CLAIMS, TablePart, describe_loss, table_parts, verdict_lines
from esper.leyline.errors import RunDirError
from esper.leyline.files import write_whole


def loss_plot(runs: Runs, metric: Metric) -> Any:
    """Validation loss against training FLOPs per arm."""
    figure = new_figure(height=3.4)
    axes = figure.subplots()
    for index, (arm, by_seed) in enumerate(runs.items()):
        curves = [[(p.flops, p.loss) for p in run.curve] for run in by_seed.values()]
        low = max(curve[0][0] for curve in curves)
        high = min(curve[-1][0] for curve in curves)
        if high <= low:
            continue
        grid = np.geomspace(low, high, 120)
        losses = np.array([np.interp(grid, *np.array(curve).T) for curve in curves])
        middle, bottom, top = (np.quantile(losses, q, axis=0) for q in (0.5, 0.25, 0.75))
        (line,) = axes.plot(grid, middle, label=arm, linewidth=1.6, linestyle=("-", "--", ":")[index // 10 % 3])
        axes.fill_between(grid, bottom, top, alpha=0.12, color=line.get_color())
    axes.set(xscale="log", xlabel="training FLOPs", ylabel=describe_loss(metric).lower())
    legend_above(figure)
    return figure


def size_plot(runs: Runs, metric: Metric) -> Any:
    """The metric on the test part against parameters; one point per run."""
    figure = new_figure(height=3.0)
    axes = figure.subplots()
    for arm, by_seed in runs.items():
        axes.scatter(
            [run.parameters for run in by_seed.values()],
            [metric.scale * metric.value(run) for run in by_seed.values()],
            s=22,
            alpha=0.75,
            label=arm,
        )
    axes.set(xscale="log", xlabel="parameters at the end", ylabel=f"test {metric.head}")
    legend_above(figure)
    return figure


def _spans(run: RunRecord) -> list[tuple[str, int, int, str]]:
    """(slot, first tick, last tick, stage) of every time that a slot spent in a stage with a colour."""
    spans, open_ = [], dict[str, tuple[int, str]]()
    for line in run.stages:
        if line.slot in open_:
            since, stage = open_.pop(line.slot)
            spans.append((line.slot, since, line.tick, stage))
        if line.target in STAGE_COLOURS:
            open_[line.slot] = (line.tick, line.target)
    return spans + [(slot, since, run.ticks, stage) for slot, (since, stage) in open_.items()]


def stage_plot(runs: Runs) -> Any | None:
    """Stage timelines of the first seed of each arm in which something grew; None if nothing did."""
    grown = {arm: min(by_seed.items())[1] for arm, by_seed in runs.items() if any(r.stages for r in by_seed.values())}
    grown = {arm: run for arm, run in grown.items() if run.stages}
    if not grown:
        return None
    rows = [(arm, slot) for arm, run in grown.items() for slot in sorted({line.slot for line in run.stages})]
    figure = new_figure(height=0.6 + 0.28 * len(rows))
    axes = figure.subplots()
    for arm, run in grown.items():
        for slot, since, until, stage in _spans(run):
            axes.barh(rows.index((arm, slot)), until - since, left=since, color=STAGE_COLOURS[stage], height=0.8)
    axes.set_yticks(range(len(rows)), [f"{arm}  {slot}" for arm, slot in rows], fontsize=7)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel("control tick")
    bars = [axes.barh(0, 0, color=colour, edgecolor=INK, linewidth=0.3) for colour in STAGE_COLOURS.values()]
    legend_above(figure, bars, [name.lower() for name in STAGE_COLOURS])
    longest = max(len(arm) + len(slot) for arm, slot in rows)
    figure.subplots_adjust(left=min(0.45, 0.05 + 0.013 * longest))
    return figure


def _table(part: TablePart) -> str:
    return table(part.heads, [[html.escape(text) for text in row] for row in part.rows], part.title)


def _verdicts(comparison: Comparison) -> str:
    rows = "".join(
        f'<tr><td class="{word.lower()}">{word}</td><td>{html.escape(claim)}</td><td>{html.escape(figure)}</td></tr>'
        for word, claim, figure in verdict_lines(comparison)
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
    return f'<div class="scroll" tabindex="0"><table class="said">{rows}</table></div>' + (
        f'<ul class="notes">{notes}</ul>' if notes else ""
    )


def write_page(comparison: Comparison, runs: Runs, path: Path, *, command: str, where: Mapping[str, str]) -> None:
    """Writes the page, whole or not at all.

    Args:
        comparison: the comparison to show.
        runs: the records that it was made of.
        path: the file.
        command: the command that reproduces it.
        where: the folder of each run, by "arm/seed".

    Raises:
        ConfigError: matplotlib is not installed.
        RunDirError: the file cannot be written.
    """
    matplotlib()
    present, metric = {arm: by_seed for arm, by_seed in runs.items() if by_seed}, comparison.metric
    figures = [
        ("Loss against compute", "Median over seeds; shaded between the quartiles.", loss_plot(present, metric)),
        ("Size and score", "One point per run; the checkpoint that validation chose.", size_plot(present, metric)),
        ("Stages", "The first seed of each arm that grew.", stage_plot(present)),
    ]
    drawn = "".join(
        plot(figure, title, caption, f"plot-{index}")
        for index, (title, caption, figure) in enumerate(figures)
        if figure is not None
    )
    tables = "".join(map(_table, table_parts(comparison)))
    listed = "".join(f"<li>{html.escape(key)}: {html.escape(folder)}</li>" for key, folder in where.items())
    body = (
        f'<main id="main"><p><code>{html.escape(command)}</code></p><p>± is half of a 95 % interval over seeds '
        "(Student's t); [low, high] is a 95 % bootstrap interval. Differences are of the test score, paired by seed. "
        f"The test part was read once per run, on the checkpoint that validation chose.</p>{tables}"
        f"<h2>What may be said</h2><p>{CLAIMS}.</p>{_verdicts(comparison)}"
        f'<h2>Plots</h2><div class="plots">{drawn}</div>'
        f"<h2>Runs</h2><ul>{listed}</ul></main>"
    )
    text = page(comparison.name, body)
    try:
        write_whole(path, text)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise RunDirError(
            f"{path}: cannot be written ({why}); make room or see to the folder, then give the command with --report"
        ) from error
