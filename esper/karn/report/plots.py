"""The plots of a report. Each draws series that know their source; what is drawn is also in the table beneath it."""

from collections.abc import Mapping, Sequence
from typing import Any

from esper.karn.html import COLOURS, INK, STAGE_COLOURS, engineering, legend_above, matplotlib, new_figure
from esper.karn.lives import Life
from esper.karn.report.gather import RunReport
from esper.karn.report.traced import Figure, Series, from_event
from esper.leyline.stages import Stage

STYLES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
GROWTH = {  # what a mark on the step axis says; in both its sign and its words
    Stage.GERMINATED: ("^", "born"),
    Stage.BLENDING: ("o", "joins"),
    Stage.FOSSILIZED: ("s", "kept"),
    Stage.PRUNED: ("x", "pruned"),
}


def colour(index: int) -> str:
    """The colour of the n-th line."""
    return COLOURS[index % len(COLOURS)]


def draw_lines(lines: Sequence[Series], unit: str, *, last_step: int = 0, lives: Sequence[Life] = ()) -> Any:
    """Lines over optimizer steps, with a band of one standard error where there are any, and marks of growth."""
    figure = new_figure()
    axes = figure.subplots()
    for index, line in enumerate(lines):
        if not line.steps:
            continue
        style = STYLES[index // len(COLOURS) % len(STYLES)]
        few = {"marker": MARKERS[index % len(MARKERS)], "markersize": 3} if len(line.steps) < 40 else {}
        axes.plot(line.steps, line.numbers, style, color=colour(index), label=line.name, gid=f"line-{index}", **few)
        errors = [figure.value or 0.0 for figure in line.errors]
        if errors:
            low, high = ([v + sign * e for v, e in zip(line.numbers, errors)] for sign in (-1, 1))
            axes.fill_between(line.steps, low, high, color=colour(index), alpha=0.18, linewidth=0)
    axes.set(xlabel="optimizer step", ylabel=unit)
    if last_step:
        axes.set_xlim(0, last_step)
    if unit in ("FLOPs", "FLOPs/s", "samples/s", "parameters"):
        axes.yaxis.set_major_formatter(engineering())
        figure.subplots_adjust(left=0.18)
    if lives:
        _mark_growth(figure, lives)
    if len(axes.get_legend_handles_labels()[1]) > 1:
        legend_above(figure)
    return figure


def _mark_growth(figure: Any, lives: Sequence[Life]) -> None:
    """Marks on the lower edge where a seed was born, joined, was kept or pruned."""
    axes = figure.axes[0]
    for stage, (sign, words) in GROWTH.items():
        moves = [move for life in lives if (move := life.reached(stage)) is not None]
        steps = [move["step"] for move in moves]
        if not steps:
            continue
        for step in steps if stage is Stage.BLENDING else ():
            axes.axvline(step, color=INK, linewidth=0.5, alpha=0.4)
        across = axes.get_xaxis_transform()
        place = {"transform": across, "clip_on": False, "linestyle": "none", "color": INK, "markersize": 5}
        axes.plot(steps, [0.02] * len(steps), sign, label=words, gid=f"growth-{words}", **place)


def draw_lanes(report: RunReport) -> Any:
    """A lane per slot: which stage its seed was in, over optimizer steps."""
    slots = report.slots
    figure = new_figure(height=0.6 + 0.36 * len(slots))
    axes = figure.subplots()
    end = max(report.last_step, 1)
    for slot, first, last, stage, blueprint in spans(report, end):
        row = slots.index(slot)
        axes.barh(row, last - first, left=first, height=0.7, color=STAGE_COLOURS[stage], edgecolor=INK, linewidth=0.3)
        if last - first > end * 0.09:
            words = stage.lower() if last - first < end * 0.2 else f"{stage.lower()} {blueprint}"
            dark = stage in ("FOSSILIZED", "PRUNED", "HOLDING")
            axes.text(
                (first + last) / 2, row, words, ha="center", va="center", color="#fff" if dark else "#000", fontsize=7
            )
    axes.set_yticks(range(len(slots)), slots)
    axes.set(xlabel="optimizer step", xlim=(0, end), ylim=(len(slots) - 0.5, -0.5))
    axes.grid(visible=False)
    shown = [stage for stage in STAGE_COLOURS if any(span[3] == stage for span in spans(report, end))]
    bars = [axes.barh(0, 0, color=STAGE_COLOURS[stage], edgecolor=INK, linewidth=0.3) for stage in shown]
    names = [stage.lower() for stage in shown]
    pruned = [life for life in report.lives if life.fate == "pruned"]
    if pruned:
        ends = [move["step"] for life in pruned if (move := life.reached(Stage.PRUNED)) is not None]
        rows = [slots.index(life.slot) for life in pruned]
        behind = matplotlib().transforms.offset_copy(axes.transData, figure, x=5, units="points")
        form = {"color": INK, "markersize": 5, "clip_on": False, "gid": "pruned", "transform": behind}
        crosses = axes.plot(ends, rows, "x", **form)
        bars, names = [*bars, *crosses], [*names, "pruned"]
    legend_above(figure, bars, names)
    return figure


def spans(report: RunReport, end: int) -> list[tuple[str, int, int, str, str]]:
    """(slot, first step, last step, stage, blueprint) of every time that a slot spent in a stage with a seed."""
    found = []
    for life in report.lives:
        moves = life.of("stage")
        for move, after in zip(moves, [*moves[1:], None]):
            stage = move["payload"]["target"]
            if stage in STAGE_COLOURS and stage != "PRUNED":
                last = after["step"] if after is not None else end
                found.append((life.slot, move["step"], last, stage, life.blueprint))
    return found


def looks_of(report: RunReport) -> dict[str, Series]:
    """The contribution at each look, with its standard error, by seed."""
    found = {}
    for life in report.lives:
        line = Series(name=f"{life.slot} {life.blueprint}")
        for look in life.of("contribution"):
            error = from_event(look, "contribution", "se")
            line.add(look["step"], from_event(look, "contribution", "value"), error)
        if line.steps:
            found[f"{life.slot}.{life.generation}"] = line
    return found


def evidence_of(report: RunReport) -> tuple[list[Series], list[Series]]:
    """Log evidence at each look, by seed, and the bound that its gate sets, beside it."""
    found, bounds = [], []
    for life in report.lives:
        line, bound = Series(name=f"{life.slot} {life.blueprint}"), Series(name="its bound")
        for look in life.of("contribution"):
            value, chance = from_event(look, "log_evidence"), from_event(look, "chance")
            if value.value is not None:
                line.add(look["step"], value)
                bound.add(look["step"], chance)
        if line.steps:
            found.append(line)
            bounds.append(bound)
    return found, bounds


def draw_looks(looks: Mapping[str, Series], last_step: int) -> Any:
    """Contribution with error bars, a colour and a sign per seed."""
    figure = new_figure()
    axes = figure.subplots()
    for index, line in enumerate(looks.values()):
        errors = [error.value or 0.0 for error in line.errors]
        form = {"fmt": MARKERS[index % len(MARKERS)], "color": colour(index), "capsize": 2, "markersize": 4}
        axes.errorbar(line.steps, line.numbers, yerr=errors, label=line.name, **form)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="loss saved (per sample)", xlim=(0, last_step))
    legend_above(figure)
    return figure


def draw_evidence(lines: Sequence[Series], bounds: Sequence[Sequence[float]], last_step: int) -> Any:
    """Log evidence of each seed, and the bound that judged it, dashed in the same colour."""
    figure = new_figure()
    axes = figure.subplots()
    for index, (line, bound) in enumerate(zip(lines, bounds)):
        axes.plot(
            line.steps, line.numbers, MARKERS[index % len(MARKERS)], color=colour(index), label=line.name, markersize=4
        )
        axes.step(line.steps, bound, "--", where="mid", color=colour(index), linewidth=1)
        if len(line.steps) == 1:
            axes.plot(line.steps, bound, "_", color=colour(index), markersize=12)
    axes.set(xlabel="optimizer step", ylabel="log evidence (dashed: the bound)", xlim=(0, last_step))
    legend_above(figure)
    return figure


def values_table(lines: Sequence[Series]) -> tuple[list[str], list[list[str]]]:
    """What a plot shows, as heads and rows: a row per step, a column per line, with ± where there are errors."""
    by_step: dict[int, dict[int, tuple[Figure, Figure | None]]] = {}
    for index, line in enumerate(lines):
        for place, (step, value) in enumerate(zip(line.steps, line.values)):
            by_step.setdefault(step, {})[index] = (value, line.errors[place] if line.errors else None)
    rows = []
    for step, cells in sorted(by_step.items()):
        row = [f"{step:,}"]
        for index in range(len(lines)):
            cell = cells.get(index)
            if cell is None:
                row.append("")
                continue
            value, error = cell
            row.append(value.show() + (f" ± {error.show('.2g')}" if error and error.value is not None else ""))
        rows.append(row)
    return ["step", *(line.name for line in lines)], rows
