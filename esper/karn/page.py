"""A comparison as one self-contained HTML file: tables, verdicts, three plots. Needs matplotlib (extra ``report``).

loss against FLOPs        median over seeds, the range between the quartiles shaded, log FLOPs
parameters, accuracy      one point per run
stages                    the stage of each slot over ticks, for the first seed of each arm that grows
"""

import html
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from esper.karn.comparison import Comparison
from esper.karn.rows import Runs
from esper.karn.runs import RunRecord
from esper.karn.table import CLAIMS, TablePart, table_parts, verdict_lines
from esper.leyline.errors import ConfigError, RunDirError
from esper.leyline.files import write_whole

STAGE_COLOURS = {
    "GERMINATED": "#bbbbbb",
    "TRAINING": "#e69f00",
    "BLENDING": "#56b4e9",
    "HOLDING": "#009e73",
    "FOSSILIZED": "#0072b2",
    "PRUNED": "#d55e00",
}

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 78em; padding: 0 1em; color: #1b1b1b }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th { white-space: pre-line; vertical-align: bottom }
caption { text-align: left; color: #555; padding: 1em 0 .3em }
th:first-child, td:first-child, .said td { text-align: left }
.scroll { overflow-x: auto } .no { color: #b00020; font-weight: 600 } .yes { color: #00695c; font-weight: 600 }
svg { max-width: 100%; height: auto } h2 { margin-top: 2em } figcaption { color: #555 }
"""


def _matplotlib() -> Any:
    """Imports pyplot with the backend for SVG; a ConfigError says how to go without it."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "the page needs matplotlib; install esper[report], or leave the page out with --no-page"
        ) from None
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    return plt


def _svg(plt: Any, figure: Any) -> str:
    """A figure as an element of HTML; closes it."""
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    plt.close(figure)
    whole = text.getvalue()
    return whole[whole.index("<svg") :]


def loss_plot(plt: Any, runs: Runs) -> Any:
    """Validation loss against training FLOPs per arm."""
    figure, axes = plt.subplots(figsize=(9, 4.6))
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
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="validation loss (nats per sample)")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.25)
    return figure


def size_plot(plt: Any, runs: Runs) -> Any:
    """Test accuracy against parameters, one point per run."""
    figure, axes = plt.subplots(figsize=(9, 3.8))
    for arm, by_seed in runs.items():
        axes.scatter(
            [run.parameters for run in by_seed.values()],
            [100 * run.test_accuracy for run in by_seed.values()],
            s=22,
            alpha=0.75,
            label=arm,
        )
    axes.set(xscale="log", xlabel="parameters at the end", ylabel="test accuracy (%)")
    axes.legend(fontsize=8, ncols=3)
    axes.grid(alpha=0.25)
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


def stage_plot(plt: Any, runs: Runs) -> Any | None:
    """Stage timelines of the first seed of each arm in which something grew; None if nothing did."""
    grown = {arm: min(by_seed.items())[1] for arm, by_seed in runs.items() if any(r.stages for r in by_seed.values())}
    grown = {arm: run for arm, run in grown.items() if run.stages}
    if not grown:
        return None
    rows = [(arm, slot) for arm, run in grown.items() for slot in sorted({line.slot for line in run.stages})]
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.28 * len(rows)))
    for arm, run in grown.items():
        for slot, since, until, stage in _spans(run):
            axes.barh(rows.index((arm, slot)), until - since, left=since, color=STAGE_COLOURS[stage], height=0.8)
    axes.set_yticks(range(len(rows)), [f"{arm}  {slot}" for arm, slot in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("control tick")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in STAGE_COLOURS.values()]
    axes.legend(
        handles,
        [name.lower() for name in STAGE_COLOURS],
        fontsize=7,
        ncols=6,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
    )
    return figure


def _table(part: TablePart) -> str:
    head = "".join(f"<th>{html.escape(text)}</th>" for text in part.heads)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in part.rows)
    return (
        f'<div class="scroll"><table><caption>{html.escape(part.title)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _verdicts(comparison: Comparison) -> str:
    rows = "".join(
        f'<tr><td class="{word.lower()}">{word}</td><td>{html.escape(claim)}</td><td>{html.escape(figure)}</td></tr>'
        for word, claim, figure in verdict_lines(comparison)
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes)
    return f'<table class="said">{rows}</table>' + (f'<ul class="notes">{notes}</ul>' if notes else "")


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
    plt = _matplotlib()
    present = {arm: by_seed for arm, by_seed in runs.items() if by_seed}
    figures = [
        ("Loss against compute", "Median over seeds; shaded between the quartiles.", loss_plot(plt, present)),
        ("Size and accuracy", "One point per run; the checkpoint that validation chose.", size_plot(plt, present)),
        ("Stages", "The first seed of each arm that grew.", stage_plot(plt, present)),
    ]
    drawn = "".join(
        f"<h2>{title}</h2><figure>{_svg(plt, figure)}<figcaption>{caption}</figcaption></figure>"
        for title, caption, figure in figures
        if figure is not None
    )
    tables = "".join(map(_table, table_parts(comparison)))
    listed = "".join(f"<li>{html.escape(key)}: {html.escape(folder)}</li>" for key, folder in where.items())
    text = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(comparison.name)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(comparison.name)}</h1>"
        f"<p><code>{html.escape(command)}</code></p><p>± is half of a 95 % interval over seeds (Student's t); "
        "[low, high] is a 95 % bootstrap interval. Differences are of the test score, paired by seed. The test part "
        f"was read once per run, on the checkpoint that validation chose.</p>{tables}"
        f"<h2>What may be said</h2><p>{CLAIMS}.</p>{_verdicts(comparison)}{drawn}"
        f"<h2>Runs</h2><ul>{listed}</ul></body></html>"
    )
    try:
        write_whole(path, text)
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise RunDirError(
            f"{path}: cannot be written ({why}); make room or see to the folder, then give the command with --report"
        ) from error
