"""Arms at marks as tables, for a terminal and as Markdown."""

from rich.console import Group, RenderableType
from rich.text import Text

from esper.compare.marked import MarkedReport
from esper.karn.marks import MarkRow, MarkVerdict
from esper.karn.table import TablePart, format_interval, format_number, markdown_table, terminal_table

ERRORS = 2  # standard errors by which a claim holds


def _at_marks(report: MarkedReport) -> list[TablePart]:
    parts = []
    rows = report.marks.rows
    for mark in dict.fromkeys(row.mark for row in rows):
        here = [row for row in rows if row.mark == mark]
        apart = list(here[0].apart)
        parts.append(
            TablePart(
                title=f"after {mark:g} of what the trained host has cost ({mark * report.marks.sunk:.3g} FLOPs)",
                heads=("arm", "seeds", "loss", *apart, "IQM", "behind the subject", "P(subject is better)"),
                rows=tuple(_cells(row, apart) for row in here),
            )
        )
    return parts


def _cells(row: MarkRow, apart: list[str]) -> tuple[str, ...]:
    behind = format_number(row.behind, 4, sign="+")
    if row.behind is not None and row.behind.se:
        behind += f" ({row.behind.value / row.behind.se:+.1f} SE)"
    return (
        row.arm,
        str(len(row.seeds)),
        format_number(row.loss, 4),
        *(format_number(row.apart[name], 4) for name in apart),
        format_interval(row.middle, 4),
        behind,
        format_interval(row.subject_better, 2),
    )


def _of_arms(report: MarkedReport) -> TablePart:
    marks, found = report.marks, report.found
    arms = list(marks.cost)

    def crossing(arm: str) -> str:
        if arm not in marks.crossings:
            return "the subject"
        at = marks.crossings[arm]
        return "–" if at is None else f"{at.lower} from {at.mark:.2f}"

    def trials(arm: str) -> str:
        if found is None or arm not in found.losses:
            return "–"
        return " ".join(f"{rate:g}:{loss:.4f}" for rate, loss in found.losses[arm].items())

    rows = [
        (
            arm,
            "–" if found is None or arm not in found.rates else f"{found.rates[arm]:g}",
            f"{marks.cost[arm]:.3g}",
            format_number(marks.regret.get(arm), 4),
            crossing(arm),
            trials(arm),
        )
        for arm in arms
    ]
    heads = ("arm", "rate", "FLOPs", "regret, marks to 1", "lower of it and the subject", "search: rate:loss")
    return TablePart(title="rates, anytime regret against the fixed sizes, crossings", heads=heads, rows=tuple(rows))


def _verdict(name: str, verdict: MarkVerdict) -> tuple[str, str, str]:
    claim, errors = verdict.claim, verdict.errors
    says = "open" if errors is None else "yes" if errors > ERRORS else "NO" if errors < -ERRORS else "open"
    figure = format_number(verdict.difference, 4, sign="+")
    if errors is not None:
        figure += f", {abs(errors):.1f} SE {'lower' if errors > 0 else 'higher'}"
    return says, f"{name}: {claim.metric} of {claim.arm} is lower than of {claim.than}", figure


def _parts(report: MarkedReport) -> list[TablePart]:
    claims = tuple(_verdict(name, verdict) for name, verdict in report.marks.verdicts.items())
    head = f"claims: lower by more than {ERRORS} standard errors of paired differences"
    shown = TablePart(title=head, heads=("", "claim", "difference"), rows=claims)
    return [*_at_marks(report), _of_arms(report), *([shown] if claims else [])]


def _notes(report: MarkedReport) -> list[str]:
    done, wanted = report.seeds
    notes = [] if done == wanted else [f"{done} of {wanted} seeds are whole so far"]
    if report.found is not None and report.found.edges:
        notes.append(f"the best rate of {', '.join(report.found.edges)} lies at an edge of the search")
    return [*notes, *report.notes]


def marked_table(report: MarkedReport) -> RenderableType:
    """Tables, claims and notes for a terminal."""
    shown: list[RenderableType] = [Text(f"{report.name}: ± half of a 95 % interval over seeds (Student's t)")]
    for part in _parts(report):
        shown += [Text(f"\n{part.title}"), terminal_table(part)]
    return Group(*shown, *(Text(f"note: {note}") for note in _notes(report)))


def marked_markdown(report: MarkedReport) -> str:
    """The same as Markdown."""
    text = [line for part in _parts(report) for line in (f"{part.title}:", "", *markdown_table(part), "")]
    return "\n".join([*text, *(f"Note: {note}.\n" for note in _notes(report))])
