"""The sections of a report on how the run fared: health, faults, checkpoints. One without data is not there."""

import html

from esper.karn.html import table
from esper.karn.report.gather import RunReport
from esper.karn.report.sections import cite, left_out
from esper.karn.report.traced import from_event
from esper.karn.why.sentence import at


def health(report: RunReport) -> str:
    """What was odd, what each birth did to the loss, the memory in use, kernels; empty without any of these."""
    return _alerts(report) + _settled(report) + _kernels(report) + _memory(report)


def _alerts(report: RunReport) -> str:
    rows = []
    for record in report.of("health"):
        payload = record["payload"]
        who = "all" if payload["rank"] is None else f"rank {payload['rank']}"
        name = payload["ailment"].lower().replace("_", " ")
        value, limit = (from_event(record, key).show(".3g") for key in ("value", "limit"))
        rows.append([at(record) + cite(record), name, who, value, limit, html.escape(payload["words"])])
        rows[-1].append(html.escape(payload["look_at"]))
    heads = ["when", "what", "who", "measured", "limit", "in words", "look at"]
    told = "<p>Each was odd at that moment, and the run went on: nothing is decided by it.</p>"
    told += left_out(report, "health")
    return f"<h3>Odd moments</h3>{told}{table(heads, rows, words=(5, 6), cards=True)}" if rows else ""


def _settled(report: RunReport) -> str:
    rows = []
    for record in report.of("settled"):
        payload = record["payload"]
        names = [html.escape(payload["slot"]), html.escape(payload["blueprint"]), payload["after"]]
        back = from_event(record, "recovery").show(",.0f") if payload["recovery"] is not None else "not yet"
        rise = from_event(record, "height").show("+.3g")
        rows.append([at(record) + cite(record), *names, rise, back if payload["height"] > 0 else "no spike"])
    heads = ["when", "slot", "blueprint", "after its", "rise of the loss", "steps until it was back"]
    told = "<p>The highest training loss since then, less the mean of the ticks before; below 0 there was no spike.</p>"
    told += left_out(report, "settled")
    return f"<h3>After a birth</h3>{told}{table(heads, rows, cards=True)}" if rows else ""


def _kernels(report: RunReport) -> str:
    rows = [
        [at(record) + cite(record), html.escape(record["payload"]["where"])]
        + [from_event(record, key).show(",.0f") for key in ("compile_ms", "hits", "misses")]
        for record in report.of("kernels")
    ]
    heads = ["when", "where", "ms of training that waited", "graphs from disk", "graphs compiled"]
    return f"<h3>Compiled kernels</h3>{left_out(report, 'kernels')}{table(heads, rows)}" if rows else ""


def _memory(report: RunReport) -> str:
    with_device = any(device.value is not None for _, device in report.memory.values())
    rows = [
        [rank, host.show(".1f", 100.0), *([device.show(".1f", 100.0)] if with_device else [])]
        for rank, (host, device) in report.memory.items()
    ]
    told = "<p>Percent in use at the newest tick, by each rank's own file.</p>"
    heads = ["rank", "of the machine or job", *(["of the device"] if with_device else [])]
    return f"<h3>Memory</h3>{told}{table(heads, rows)}" if rows else ""


def troubles(report: RunReport) -> str:
    """Faults of all ranks, panics, rollbacks, turns of the breaker; empty if there were none."""
    kinds = ("fault", "panic", "rollback", "breaker", "skipped", "degraded", "veto", "shift")
    rows = []
    for record in sorted([*report.of(*kinds), *report.digest.others], key=lambda r: r["time"]):
        payload = record["payload"]
        words = payload.get("what") or payload.get("words") or payload.get("reason")
        if record["kind"] == "rollback":
            words = f"back to step {payload['to_step']}, blamed: {', '.join(payload['blamed']) or 'nobody'}"
        elif record["kind"] == "skipped":
            words = f"{payload['count']} steps from step {payload['first_step']}"
        rows.append([at(record) + cite(record), f"rank {record['rank']}", record["kind"], html.escape(str(words))])
    shown = table(["when", "who", "kind", "what"], rows, words=(3,), cards=True)
    return left_out(report, *kinds) + shown if rows else ""


def saves(report: RunReport) -> str:
    """Checkpoints, with size and time; empty without any."""
    rows = [
        [at(record) + cite(record), from_event(record, "saved_step").show(",.0f")]
        + [
            from_event(record, key).show(form)
            for key, form in (("bytes", ",.0f"), ("save_ms", ".1f"), ("stall_ms", ".2f"))
        ]
        for record in report.of("checkpoint")
    ]
    shown = table(["committed", "step", "bytes", "ms of writing", "ms of standing still"], rows)
    return left_out(report, "checkpoint") + shown if rows else ""
