"""A comparison as tables: the columns that terminal, page and Markdown share, and the output for terminal and Markdown.

There are three parts, each as wide as a terminal: scores and their differences, validation loss and cost, robust
statistics.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from esper.karn.comparison import Comparison
from esper.karn.rows import BASELINES, Metric, Row
from esper.karn.stats import Estimate

CLAIMS = """yes: shown, NO: refuted, open: neither. By t-tests over paired seeds and a sign test, with Holm over all
claims of this table: 5 % for any wrong one. Intervals are each claim's own"""
Column = tuple[str, Callable[[Row], str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TablePart:
    """One table: title, column heads (a newline breaks a line), and a row of cells per arm."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def format_number(estimate: Estimate | None, places: int, scale: float = 1.0, sign: str = "") -> str:
    """``value ± half of the 95 % interval``; a dash for None. ``sign="+"`` also writes a plus."""
    if estimate is None:
        return "–"
    value = f"{estimate.value * scale:{sign},.{places}f}"
    if estimate.low is None or estimate.high is None:
        return value
    return f"{value} ± {(estimate.high - estimate.low) / 2 * abs(scale):,.{places}f}"


def format_interval(estimate: Estimate | None, places: int, scale: float = 1.0) -> str:
    """``value [low, high]`` of a bootstrap, whose intervals need not be symmetric; a dash for None."""
    if estimate is None:
        return "–"
    value = f"{estimate.value * scale:.{places}f}"
    if estimate.low is None or estimate.high is None:
        return value
    low, high = sorted((estimate.low * scale, estimate.high * scale))
    return f"{value} [{low:.{places}f}, {high:.{places}f}]"


def format_ratio(row: Row) -> str:
    """FLOPs to final's loss over final's FLOPs, and the number of shared seeds on which the arm reached that loss."""
    if row.to_final is None:
        return "–"
    share = "–" if math.isinf(row.to_final) else f"{row.to_final:.2f}"
    return f"{share} ({row.reached}/{row.asked})"


def _score_columns(metric: Metric) -> list[Column]:
    of_accuracy: list[Column] = [
        ("validation:\nfinal %", lambda row: format_number(row.final_accuracy, 2, 100)),
        ("validation:\nbest %", lambda row: format_number(row.best_accuracy, 2, 100)),
    ]
    of_own: list[Column] = [
        (f"validation:\nfinal {metric.head}", lambda row: format_number(row.final, metric.places, metric.scale)),
        (f"test\n{metric.head}", lambda row: format_number(row.value, metric.places, metric.scale)),
    ]
    accuracy: Column = ("test\naccuracy %", lambda row: format_number(row.test_accuracy, 2, 100))
    loss: Column = ("test loss", lambda row: format_number(row.test_loss, 4))
    name = metric.info.name
    if name == "accuracy":
        shown, unit = [*of_accuracy, accuracy, loss], metric.unit
    else:
        shown = [loss, *([accuracy] if metric.graded else [])] if name == "loss" else [*of_own, loss]
        unit = ", ".join(word for word in (metric.unit, "+ better") if word)

    def minus(other: str) -> Column:
        return (
            f"− {other}\n({unit})",
            lambda row: format_number(row.against.get(other), metric.places, metric.scale, sign="+"),
        )

    return [("seeds", lambda row: str(len(row.seeds))), *shown, *map(minus, BASELINES)]


def _loss_columns(comparison: Comparison) -> list[Column]:
    at = comparison.equal_flops.values()
    places = 1 if min(row.flops.value for row in comparison.rows) > 10e9 else 4
    where = f"{statistics.fmean(at) / 1e9:,.{places}f} GFLOP (mean)" if at else "equal FLOPs"
    return [
        ("final loss", lambda row: format_number(row.final_loss, 4)),
        ("best loss", lambda row: format_number(row.best_loss, 4)),
        (f"loss at\n{where}", lambda row: format_number(row.equal_loss, 4)),
        ("FLOPs to final's loss /\nfinal's (reached on)", format_ratio),
        ("GFLOP", lambda row: format_number(row.flops, places, 1e-9)),
        ("parameters", lambda row: format_number(row.parameters, 0)),
    ]


def _robust_columns(metric: Metric) -> list[Column]:
    scale = metric.scale if metric.info.higher else -metric.scale

    def above(other: str) -> Column:
        return f"P(> {other})", lambda row: format_interval(row.beats.get(other), 2)

    head = f"IQM of\ntest {metric.head}"
    return [(head, lambda row: format_interval(row.iqm, metric.places, scale)), *map(above, BASELINES)]


def describe_differences(metric: Metric) -> str:
    """The unit of differences of scores, in words."""
    if metric.info.unit == "share":
        return f"points (of 100) of test {metric.info.name}"
    return f"{metric.unit} of test {metric.info.name}" if metric.unit else f"test {metric.info.name}"


def describe_loss(metric: Metric) -> str:
    """Validation loss with its unit, in words."""
    return f"Validation loss in {metric.loss_unit} per sample" if metric.loss_unit else "Validation loss per sample"


def table_parts(comparison: Comparison) -> list[TablePart]:
    """Builds the tables; the head of a column names its unit."""
    metric = comparison.metric
    tables = (
        (
            f"Validation and test; differences in {describe_differences(metric)}, paired by seed, positive is better",
            _score_columns(metric),
        ),
        (
            f"{describe_loss(metric)}, and cost; means, but a median for FLOPs to final's loss",
            _loss_columns(comparison),
        ),
        (
            "Interquartile mean of the test score, and probability of a better one than the baseline's; "
            "[95 % interval] by bootstrap",
            _robust_columns(metric),
        ),
    )
    return [
        TablePart(
            title=title,
            heads=("arm", *(head for head, _ in columns)),
            rows=tuple((row.arm, *(cell(row) for _, cell in columns)) for row in comparison.rows),
        )
        for title, columns in tables
    ]


def verdict_lines(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(yes, NO or open; claim; figure) of every claim: shown, refuted or neither; that on headroom comes first."""
    word = {True: "yes", False: "NO", None: "open"}
    conclusion = {
        True: "informative: capacity matters here",
        False: "UNINFORMATIVE: capacity does not matter here, whatever the rows say",
        None: "headroom is not shown: that takes final above none and above every smaller fixed size, one or more",
    }[comparison.informative]
    return [
        (word[comparison.informative], conclusion, ""),
        *((word[verdict.holds], verdict.claim, verdict.figure) for verdict in comparison.verdicts),
    ]


def terminal_table(part: TablePart) -> Table:
    """A table for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, head in enumerate(part.heads):
        table.add_column(Text(head), justify="left" if index == 0 else "right", vertical="bottom", no_wrap=True)
    for row in part.rows:
        table.add_row(*map(Text, row))
    return table


def comparison_table(comparison: Comparison) -> RenderableType:
    """Tables, verdicts and notes for a terminal; ± is half of a 95 % interval over seeds."""
    shown: list[RenderableType] = [Text(f"{comparison.name}: ± half of a 95 % interval over seeds (Student's t)")]
    for part in table_parts(comparison):
        shown += [Text(f"\n{part.title}"), terminal_table(part)]
    shown.append(Text(f"\n{CLAIMS}"))
    verdicts = Table(box=None, show_header=False)
    for line in verdict_lines(comparison):
        verdicts.add_row(*map(Text, line))  # Text: names and notes may hold brackets, which are markup to rich
    return Group(*shown, verdicts, *(Text(f"note: {note}") for note in comparison.notes))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def markdown_table(part: TablePart) -> list[str]:
    """The lines of a table in Markdown."""
    return [_line(part.heads), "|---" * len(part.heads) + "|", *map(_line, part.rows)]


def markdown(comparison: Comparison) -> str:
    """Tables, verdicts and notes as Markdown, for a results page or an issue."""
    text = []
    for part in table_parts(comparison):
        text += [f"{part.title}:", "", *markdown_table(part), ""]
    text += [" ".join(CLAIMS.split()) + ":", "", "| | claim | figure |", "|---|---|---|"]
    text += map(_line, verdict_lines(comparison))
    return "\n".join([*text, *(f"\nNote: {note}." for note in comparison.notes)])
