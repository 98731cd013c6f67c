"""The sections of a report, as HTML. One without data is not there; `missing` says what is not shown, and why."""

import html
import math
from collections.abc import Sequence

from esper.karn.html import plot, table
from esper.karn.lives import last_look
from esper.karn.report import plots
from esper.karn.report.gather import RunReport
from esper.karn.report.traced import Figure, Series, any_point, from_event
from esper.karn.why.fates import tell_slot
from esper.karn.why.sentence import Sentence, at, name_events
from esper.leyline.stages import Stage
from esper.nissa.reading import Record

MOST = 400  # points of a line
GOOD = {"done": "good", "failed": "bad", "diverged": "bad", "lost": "bad"}


def behind(lines: Sequence[Series]) -> str:
    """The figures of a plot as a table that opens on demand."""
    heads, rows = plots.values_table(lines)
    return f"<details><summary>The figures</summary>{table(heads, rows)}</details>"


def sentences(told: Sequence[Sentence]) -> str:
    """Sentences as paragraphs, each with the events that it stands on."""
    return "".join(
        f'<p>{html.escape(one.text)}<span class="events">{html.escape(name_events(one.events))}</span></p>'
        for one in told
    )


def headline(reports: Sequence[RunReport]) -> str:
    """The numbers that are asked for first: a column per run."""
    rows = [["state", *(f'<span class="{GOOD.get(r.facts.state, "")}">{r.facts.state}</span>' for r in reports)]]
    for name, path, form, scale, unit in (
        ("test accuracy", ("test_accuracy",), ".1f", 100.0, " %"),
        ("test loss", ("test_loss",), ".4f", 1.0, ""),
        ("validation accuracy at the end", ("validation_accuracy",), ".1f", 100.0, " %"),
        ("validation loss at the end", ("validation_loss",), ".4f", 1.0, ""),
    ):
        cells = []
        for report in reports:
            value, error = (report.from_result(*path, key) for key in ("value", "se"))
            told = f" ± {error.show(form, scale)}" if error.value is not None else ""
            cells.append(value.show(form, scale) + told + unit if value.value is not None else _last(report, path[0]))
        rows.append([name, *cells])
    for metric in {metric.name: metric for r in reports for metric in r.metrics}.values():
        for part in ("test", "validation"):
            values = (r.from_result(f"{part}_metrics", metric.name).value for r in reports)
            cells = ["–" if value is None else metric.show(value) for value in values]
            rows.append([f"{part} {metric.name}", *cells])
    rows.append(["optimizer steps", *(_step(r).show(",.0f") for r in reports)])
    rows.append(["parameters", *(f"{_first(r).show(',.0f')} → {_parameters(r).show(',.0f')}" for r in reports)])
    rows.append(["training FLOPs", *(large(_flops(r), "FLOP") for r in reports)])
    fates = ("born", "kept", "pruned")
    rows.append([", ".join(fates), *(", ".join(str(n) for n in _fates(r)) for r in reports)])
    rows.append(["faults and panics", *(str(r.facts.faults) for r in reports)])
    rows.append(["ranks, starts", *(f"{r.facts.ranks or '–'}, {r.facts.attempts or '–'}" for r in reports)])
    rows = [row for row in rows if any(cell != "–" for cell in row[1:])]
    return table(["", *(r.name for r in reports)], rows)


def large(figure: Figure, unit: str) -> str:
    """A large figure with a prefix: 5.59 GFLOP."""
    if figure.value is None:
        return "–"
    for size, prefix in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(figure.value) >= size:
            return f"{figure.show('.3g', 1 / size)} {prefix}{unit}"
    return f"{figure.show('.3g')} {unit}"


def _last(report: RunReport, key: str) -> str:
    """The last value of a run that has no result yet."""
    line = report.series.get(key)
    if line is None or not line.values:
        return "–"
    accuracy = key.endswith("accuracy")
    return line.values[-1].show(".1f" if accuracy else ".4f", 100.0 if accuracy else 1.0) + (" %" if accuracy else "")


def _step(report: RunReport) -> Figure:
    done = report.from_result("step")
    return done if done.value is not None else report.newest_step


def _parameters(report: RunReport) -> Figure:
    done, line = report.from_result("parameters"), report.series["parameters"]
    return line.values[-1] if done.value is None and line.values else done


def _first(report: RunReport) -> Figure:
    return from_event(report.begun, "parameters") if report.begun else Figure(value=None, source="")


def _flops(report: RunReport) -> Figure:
    done, line = report.from_result("flops"), report.series["flops"]
    return line.values[-1] if done.value is None and line.values else done


def _fates(report: RunReport) -> tuple[int, int, int]:
    return report.fates.total(), report.fates["fossilised"], report.fates["pruned"]


def ending(report: RunReport) -> str:
    """How it ended, and what to do."""
    command = report.diagnosis.command
    todo = f"<p>To do: {report.diagnosis.action}. Type <code>{html.escape(command)}</code></p>" if command else ""
    return sentences(report.diagnosis.sentences) + todo


def compared(reports: Sequence[RunReport]) -> str:
    """Validation of several runs in one plot each."""
    drawn = []
    for key, title, unit in (
        ("validation_loss", "Validation loss, all runs", "loss"),
        ("validation_accuracy", "Validation accuracy, all runs", "share correct"),
    ):
        lines = [_named(r.series[key].thinned(MOST), r.name) for r in reports]
        if any_point(lines):
            caption = "Band: one standard error."
            drawn.append(plot(plots.draw_lines(lines, unit), title, caption, f"all-{key}", behind(lines)))
    return f'<div class="plots">{"".join(drawn)}</div>'


def _named(line: Series, name: str) -> Series:
    return Series(name=name, steps=line.steps, values=line.values, errors=line.errors)


_PACE = "Root mean square of each seed's {} over the host's; 1: they learn at one pace."


def curves(report: RunReport, name: str) -> str:
    """Loss, accuracy, stages, alpha, contribution and its evidence, size and cost, gradients, system: what there is."""
    series = {key: line.thinned(MOST) for key, line in report.series.items()}
    drawn: list[str] = []
    end = report.last_step

    def add(key: str, title: str, caption: str, lines: Sequence[Series], unit: str, *, growth: bool = False) -> None:
        if any_point(lines):
            figure = plots.draw_lines(lines, unit, last_step=end, lives=report.lives if growth else ())
            drawn.append(plot(figure, title, caption, f"{name}-{key}", behind(lines)))

    band = "Band: one standard error. Marks on the lower edge: growth; a line where a seed joins the host."
    add("loss", "Loss", band, [series["train_loss"], series["validation_loss"]], "loss", growth=True)
    add("accuracy", "Accuracy", band, [series["train_accuracy"], series["validation_accuracy"]], "share", growth=True)
    if report.lives:
        caption = "A lane per slot: the stage of its seed over the steps; empty where there was none."
        drawn.append(plot(plots.draw_lanes(report), "Life of each slot", caption, f"{name}-lanes", _moves(report)))
    alpha = [line.thinned(MOST) for line in report.alpha]
    add("alpha", "Alpha", "How far each seed is blended in, at each tick, 0 to 1.", alpha, "alpha")
    looks = plots.looks_of(report)
    if looks:
        caption = (
            "What each seed saves of the loss of a sample, at each look; above 0 it helps. Bars: one standard error."
        )
        figure = plots.draw_looks(looks, end)
        drawn.append(plot(figure, "Contribution", caption, f"{name}-contribution", behind(list(looks.values()))))
    lines, chances = plots.evidence_of(report)
    if lines:
        bounds = [[-math.log(chance) if chance > 0 else math.inf for chance in line.numbers] for line in chances]
        caption = (
            "How strong the evidence is that a seed helps, and the bound that judged it: -log of the chance of luck."
        )
        rows = behind([part for pair in zip(lines, chances) for part in pair])
        rows = rows.replace("its bound", "chance allowed")
        drawn.append(plot(plots.draw_evidence(lines, bounds, end), "Evidence", caption, f"{name}-evidence", rows))
    add(
        "parameters",
        "Parameters",
        "Of the whole network, host and seeds.",
        [series["parameters"]],
        "parameters",
        growth=True,
    )
    add("flops", "Training FLOPs", "Spent so far.", [series["flops"]], "FLOPs")
    for key, title, lines, caption in (
        ("parity", "Parity of gradients", report.ratio, "The norm of each seed's gradient over the host's."),
        ("parity-rms", "Parity of gradients, by parameter", report.gradient_parity, _PACE.format("gradient")),
        ("updates", "Parity of updates, by parameter", report.update_parity, _PACE.format("update")),
    ):
        add(key, title, caption, [line.thinned(MOST) for line in lines], "seed / host")
    add("gradient", "Gradient of the host", "Mean L2 norm per step, before clipping.", [series["gradient"]], "norm")
    times = [series[key] for key in ("steps_ms", "tick_ms", "digest_ms")]
    add("system", "Time of a tick", "Milliseconds, on rank 0's clock.", times, "ms")
    caption = "Training samples a second, ticks included."
    add("throughput", "Throughput", caption, [series["throughput"]], "samples/s")
    add("speed", "Speed", "Training FLOPs a second, ticks included.", [series["speed"]], "FLOPs/s")
    caption = "Share of the peak of all devices that training uses (telemetry.health.peak_flops)."
    add("mfu", "Use of the devices (MFU)", caption, [series["mfu"]], "percent")
    caption = "Of rank 0, in percent of the time between ticks; the rest is backward, where ranks wait for each other."
    add("waits", "Where the time goes", caption, [series["data_wait"], series["own"]], "percent")
    return f'<div class="plots">{"".join(drawn)}</div>'


def _moves(report: RunReport) -> str:
    rows = [
        [
            html.escape(life.slot),
            html.escape(life.blueprint),
            f"{move['step']:,}",
            move["payload"]["target"].lower(),
            html.escape(move["payload"]["cause"]) + cite(move),
        ]
        for life in report.lives
        for move in life.of("stage")
    ]
    shown = table(["slot", "blueprint", "step", "to", "by"], rows)
    return f"<details><summary>The moves</summary>{shown}</details>"


def cite(*records: Record) -> str:
    """The numbers of events, small."""
    return f'<span class="events">{html.escape(name_events(records))}</span>'


def seeds(report: RunReport) -> str:
    """A row per seed, and its life in sentences."""
    if not report.lives:
        return "<p>Nothing was born in this run.</p>"
    rows = []
    for life in report.lives:
        look, joined, end = last_look(life), life.reached(Stage.BLENDING), life.end
        running = "–"
        if look is not None:
            record = life.of("contribution")[-1]
            value, error = (from_event(record, "running", key) for key in ("value", "se"))
            running = value.show() + (f" ± {error.show('.2g')}" if error.value is not None else "")
        rows.append(
            [
                html.escape(life.slot),
                html.escape(life.blueprint),
                life.fate,
                at(life.birth),
                at(joined) if joined else "never",
                at(end) if end else "–",
                running,
            ]
        )
    heads = ["slot", "blueprint", "fate", "born", "joined", "ended", "loss saved (per sample)"]
    older = report.fates.total() - len(report.lives)
    told = _left_out(older, "seeds that are gone", "births", ", here and in the plots")
    told += table(heads, rows, cards=True)
    beside = [*report.of("panic", "veto"), *report.refused]
    for slot in report.slots:
        mine = [life for life in report.lives if life.slot == slot]
        told += f"<h3>{html.escape(slot)}</h3>" + sentences(tell_slot(slot, mine, beside))
    return told


def left_out(report: RunReport, *kinds: str) -> str:
    """That the oldest records of these kinds are not shown, and where they are; empty if all are."""
    return _left_out(report.records.left_out(*kinds), "records of this table", "events")


def _left_out(number: int, what: str, view: str, where: str = "") -> str:
    if not number:
        return ""
    return f"<p>{number:,} older {what} are left out{where}; all of them: <code>esper query</code>, view {view}.</p>"


def decisions(report: RunReport) -> str:
    """Every command of the controller, with its reason; empty if it gave none."""
    rows = []
    kinds = ("command", "refusal", "veto")
    for record in report.of(*kinds):
        payload = record["payload"]
        command = payload.get("command") or {"slot": payload["slot"], "op": "birth", "blueprint": payload["blueprint"]}
        verdict = {"command": "applied", "refusal": "refused", "veto": "vetoed"}[record["kind"]]
        what = f"{command['op']} {command['blueprint'] or ''}".strip()
        rows.append(
            [
                at(record) + cite(record),
                html.escape(command["slot"]),
                html.escape(what),
                verdict,
                html.escape(str(payload["reason"])),
            ]
        )
    shown = table(["when", "slot", "asked for", "verdict", "reason"], rows, words=(4,), cards=True)
    return left_out(report, *kinds) + shown if rows else ""


def missing(report: RunReport) -> str:
    """What is not shown, and why; empty if all is there."""
    if report.series["train_loss"].steps:
        return ""
    return "<p>There are no curves: the record has no ticks (telemetry.level=full writes them).</p>"
