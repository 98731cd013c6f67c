"""A comparison on the terminal."""

import math

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from esper.karn.comparison import Comparison, Row
from esper.karn.stats import Estimate


def number(estimate: Estimate | None, places: int, scale: float = 1.0) -> str:
    """``value ± half of the 95 % interval``; a dash where there is nothing."""
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value * scale:.{places}f}"
    return f"{estimate.value * scale:.{places}f} ± {(estimate.high - estimate.low) / 2 * scale:.{places}f}"


def ratio(row: Row) -> str:
    """FLOPs to final's loss over final's FLOPs, and on how many seeds it got there."""
    if row.to_final is None:
        return "–"
    share = "never" if math.isinf(row.to_final) else f"{row.to_final:.2f}"
    return f"{share} ({row.reached}/{len(row.seeds)})"


HEADS = (
    "arm", "seeds", "test accuracy %", "test loss", "final loss", "best loss", "loss at equal FLOPs", "FLOPs to final",
    "GFLOP", "parameters", "− none", "− random", "− schedule",
)  # fmt: skip


def cells(row: Row) -> list[str]:
    """One row under `HEADS`. Differences are of the test score, paired by seed."""
    return [
        row.arm, str(len(row.seeds)), number(row.test_accuracy, 2, 100), number(row.test_loss, 4),
        number(row.final_loss, 4), number(row.best_loss, 4), number(row.equal_loss, 4), ratio(row),
        f"{row.flops / 1e9:,.1f}", f"{row.parameters:,.0f}",
        *(number(row.against.get(other), 4) for other in ("none", "random", "schedule")),
    ]  # fmt: skip


def verdict_lines(found: Comparison) -> list[tuple[str, str, str]]:
    """(yes, no or open; claim; figure) of every verdict, the headroom's conclusion first."""
    word = {True: "yes", False: "NO", None: "open"}
    conclusion = {
        True: "informative: capacity matters here",
        False: "UNINFORMATIVE: capacity does not matter here, whatever the rows say",
        None: "headroom not decided: runs of final, none or a fixed size are missing",
    }[found.informative]
    return [
        (word[found.informative], conclusion, ""),
        *((word[verdict.holds], verdict.claim, verdict.figure) for verdict in found.verdicts),
    ]


SCORES = (0, 1, 2, 3, 8, 9, 10, 11, 12)
LOSSES = (0, 4, 5, 6, 7)


def _table(found: Comparison, columns: tuple[int, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title_justify="left")
    for column in columns:
        table.add_column(HEADS[column], justify="left" if column == 0 else "right", no_wrap=True)
    for row in found.rows:
        filled = cells(row)
        table.add_row(*(filled[column] for column in columns))
    return table


def comparison_table(found: Comparison) -> RenderableType:
    """Table and verdicts; ± is half of a 95 % interval over seeds."""
    tables = [_table(found, columns) for columns in (SCORES, LOSSES)]
    tables[0].title = f"{found.name}: ± half of a 95 % interval over seeds"
    said = Table(box=None, show_header=False)
    for line in verdict_lines(found):
        said.add_row(*line)
    return Group(*tables, said)
