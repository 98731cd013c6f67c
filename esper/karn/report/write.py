"""Writes the report of one run, or of several beside each other."""

import html
import os
from collections.abc import Sequence
from pathlib import Path

from esper.karn.html import matplotlib, page
from esper.karn.report import sections, system
from esper.karn.report.gather import RunReport, gather
from esper.leyline.errors import ConfigError, RunDirError
from esper.leyline.files import write_whole


def write_report(runs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes one HTML file, whole or not at all; returns its path.

    Args:
        runs: run directories, finished or not; one or more.
        out: the file; by default report.html in the first of them.

    Raises:
        ConfigError: matplotlib is not installed, or one run is named twice.
        RunDirError: one of them is no run directory or is damaged, or the file cannot be written.
    """
    matplotlib()
    if len({path.resolve() for path in runs}) < len(runs):
        raise ConfigError("report: the same run is named twice; name each once")
    names = name_runs(runs)
    reports = [gather(path, name) for path, name in zip(runs, names)]
    target = out or runs[0] / "report.html"
    try:
        write_whole(target, render(reports))
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise RunDirError(f"{target}: cannot be written ({why}); name another file with --out") from None
    return target


def name_runs(runs: Sequence[Path]) -> list[str]:
    """What the page calls each run: its path without what all of them have in front."""
    whole = [path.resolve() for path in runs]
    if len(whole) == 1:
        return [whole[0].name]
    common = Path(os.path.commonpath([path.parent for path in whole]))
    return [path.relative_to(common).as_posix() for path in whole]


def render(reports: Sequence[RunReport]) -> str:
    """The page."""
    several = len(reports) > 1
    title = "Runs beside each other" if several else f"Run {reports[0].name}"
    ids = [f"run-{index}" for index in range(len(reports))]
    links = [("numbers", "In numbers")]
    body = f'<section id="numbers"><h2>In numbers</h2>{sections.headline(reports)}'
    if several:
        body += sections.compared(reports)
        links += [(name, report.name) for name, report in zip(ids, reports)]
    body += "</section>"
    for name, report in zip(ids, reports):
        if several:
            body += f'<section id="{name}"><h2>{html.escape(report.name)}</h2></section>'
        for key, head, content in parts(report, name):
            if content:
                label = f"{head} · {report.name}" if several else head
                body += f'<section id="{name}-{key}"><h2>{html.escape(label)}</h2>{content}</section>'
                if not several:
                    links.append((f"{name}-{key}", head))
    listed = "".join(f'<li><a href="#{target}">{html.escape(text)}</a></li>' for target, text in links)
    where = ", ".join(f"<code>{html.escape(str(report.path))}</code>" for report in reports)
    foot = (
        f'<footer class="soft"><p>Made from {where} alone. [#76] is the record with "seq":76 of events.jsonl, of the '
        "first attempt and of rank 0 where nothing else is said.</p></footer>"
    )
    return page(title, f'<nav aria-label="Sections"><ul>{listed}</ul></nav><main id="main">{body}</main>{foot}')


def parts(report: RunReport, name: str) -> list[tuple[str, str, str]]:
    """The sections of one run: id, head, content; an empty content is left out."""
    return [
        ("end", "How it ended", sections.ending(report)),
        ("curves", "Curves", sections.missing(report) + sections.curves(report, name)),
        ("seeds", "What grew, and why", sections.seeds(report)),
        ("decisions", "Decisions", sections.decisions(report)),
        ("faults", "Faults and recoveries", system.troubles(report)),
        ("health", "Health", system.health(report)),
        ("saves", "Checkpoints", system.saves(report)),
    ]
