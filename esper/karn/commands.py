"""The commands that look at runs: their words on the command line, and what they print.

add_commands(parsers)     adds them to the parser of ``esper``
LOOKING[name](given)      runs one; returns its exit code
"""

import argparse
import csv
import json
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from esper.karn.report.write import write_report
from esper.karn.store.finding import name_no_run
from esper.karn.store.listing import list_runs, runs_table, visible
from esper.karn.store.query import Answer, Bounds, run_query
from esper.karn.wandb_workspace import make_workspace, save_workspace, specification
from esper.karn.why.endings import explain_end
from esper.karn.why.sentence import Sentence, name_events
from esper.karn.why.ticks import Growth, explain
from esper.leyline.errors import ConfigError
from esper.leyline.files import RunDir

WIDE = 200  # columns where the output is no terminal


def _positive(text: str) -> float:
    """Reads a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e9:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def add_commands(parsers: Any) -> None:
    """Adds the commands to the subparsers of ``esper``."""
    runs = parsers.add_parser("runs", help="list the runs below a folder", allow_abbrev=False)
    runs.add_argument("root", metavar="ROOT", type=Path, nargs="?", default=Path("runs"), help="folder; runs")
    runs.add_argument("--json", action="store_true", help="one JSON object a run, with every figure")
    query = parsers.add_parser("query", help="SQL over all runs below a folder (docs/store.md)", allow_abbrev=False)
    query.add_argument("sql", metavar="SELECT", help="exactly one statement, as 'select run, state from runs'")
    query.add_argument("--root", metavar="ROOT", type=Path, default=Path("runs"), help="folder; runs")
    query.add_argument("--format", choices=("table", "csv", "json"), default="table", help="of the answer; table")
    query.add_argument("--rows", metavar="N", type=_positive, default=10_000, help="the most rows; 10000")
    query.add_argument("--seconds", metavar="S", type=_positive, default=60.0, help="the most time; 60")
    query.add_argument("--memory", metavar="MIB", type=_positive, default=2048, help="the most memory; 2048")
    why = parsers.add_parser("why", help="why it did that, and how it ended (docs/why.md)", allow_abbrev=False)
    why.add_argument("run", metavar="RUN", type=Path, help="run directory")
    why.add_argument("what", metavar="SLOT|TICK", nargs="?", help="a slot (r0c1) or a tick (42); all seeds and the end")
    why.add_argument("--end", action="store_true", help="only how it ended, whose fault it was, and what to do")
    report = parsers.add_parser("report", help="a page on one run or several (docs/report.md)", allow_abbrev=False)
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories, finished or not")
    report.add_argument("--out", metavar="FILE", type=Path, help="the page; RUN/report.html of the first")
    space = parsers.add_parser("wandb-workspace", help="a page of panels in wandb (docs/wandb.md)", allow_abbrev=False)
    space.add_argument("--project", metavar="NAME", default=os.environ.get("WANDB_PROJECT") or "esper", help="esper")
    space.add_argument("--entity", metavar="NAME", default=os.environ.get("WANDB_ENTITY"), help="user or team in wandb")
    space.add_argument("--name", metavar="NAME", default="esper", help="of the view; esper")
    space.add_argument("--spec", action="store_true", help="print what would be sent, and send nothing")

    watch = parsers.add_parser("watch", help="runs, live or finished, in this terminal", allow_abbrev=False)
    watch.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="run directories")


def _note(lines: Any) -> None:
    for line in lines:
        print(f"esper: {visible(line)}", file=sys.stderr, flush=True)


def _console() -> Console:
    console = Console(file=sys.stdout, highlight=False)
    return console if console.is_terminal else Console(file=sys.stdout, highlight=False, width=WIDE)


def show_runs(given: argparse.Namespace) -> int:
    """``esper runs``."""
    rows, notes = list_runs(given.root)
    _note(notes)
    if given.json:
        for row in rows:
            print(json.dumps(asdict(row)))
    elif rows:
        _console().print(runs_table(rows))
        newest = next((row for row in reversed(rows) if row.fossils or row.live_seeds), rows[-1])
        print(f"next  esper why {shlex.quote(str(given.root / newest.run))}   (or: esper report, esper watch)")
    else:
        print(f"esper: no run below {given.root}")
    return 0


def _table(answer: Answer) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(answer.columns):
        number = any(isinstance(row[index], int | float) for row in answer.rows)
        table.add_column(Text(visible(name)), justify="right" if number else "left", overflow="fold")
    for row in answer.rows:
        table.add_row(*(Text("" if value is None else visible(_cell(value))) for value in row))
    return table


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def show_query(given: argparse.Namespace) -> int:
    """``esper query``."""
    bounds = Bounds(seconds=given.seconds, memory_mib=int(given.memory), rows=int(given.rows))
    answer = run_query(given.sql, given.root, bounds)
    _note(answer.notes)
    if given.format == "json":
        for row in answer.rows:
            print(json.dumps(dict(zip(answer.columns, row))))
    elif given.format == "csv":
        out = csv.writer(sys.stdout, lineterminator="\n")
        out.writerows([answer.columns, *answer.rows])
    else:
        _console().print(_table(answer))
    if answer.more:
        _note([f"only the first {len(answer.rows):,} rows; for more: --rows N"])
    return 0


LEGEND = """
Gates: G1 a newborn may learn, G2 it may join the host, G3 blended in it does no harm, G5 it helps and is kept for good.
A look measures, on samples that nobody trains on, what the network loses without the seed. ± is one standard error; log
evidence is -log of the chance that so much is luck. [#7] is the record with "seq":7 in events.jsonl. More of one slot:
esper why RUN SLOT"""


def _shown(sentence: Sentence) -> str:
    return f"{visible(sentence.text)}{name_events(sentence.events)}"


def show_why(given: argparse.Namespace) -> int:
    """``esper why``."""
    diagnosis = None
    if given.what is not None:
        told = [_shown(sentence) for sentence in explain(given.run, given.what)]
    elif given.end:
        diagnosis = explain_end(given.run)
        told = [_shown(sentence) for sentence in diagnosis.sentences]
    else:
        growth = Growth(_shown)
        diagnosis = explain_end(given.run, growth)
        told = [*growth.told(), *(_shown(sentence) for sentence in diagnosis.sentences)]
        told.append(LEGEND)
    for line in told:
        print(line)
    if diagnosis and diagnosis.command:
        print(f"\nTo do: {diagnosis.action}. Type:\n  {diagnosis.command}")
    return 0


def show_report(given: argparse.Namespace) -> int:
    """``esper report``."""
    print(f"esper: page: {write_report(given.runs, given.out)}", flush=True)
    return 0


def show_watch(given: argparse.Namespace) -> int:
    """``esper watch``."""
    try:
        from esper.karn.watch.app import WatchApp
    except ModuleNotFoundError:
        raise ConfigError("esper watch needs textual; install it: pip install 'esper[watch]'") from None
    for run in given.runs:
        if not RunDir(run).config.is_file():
            raise name_no_run(run)
    app = WatchApp(given.runs)
    app.run()
    return app.return_code or 0


def make_wandb_page(given: argparse.Namespace) -> int:
    """``esper wandb-workspace``."""
    if given.entity is None:
        raise ConfigError("--entity: name the user or team in wandb that has the project (or set WANDB_ENTITY)")
    workspace = make_workspace(given.entity, given.project, given.name)
    if given.spec:
        print(json.dumps(specification(workspace), indent=1))
    else:
        print(f"esper: workspace: {save_workspace(workspace)}", flush=True)
    return 0


LOOKING: dict[str, Callable[[argparse.Namespace], int]] = {
    "runs": show_runs,
    "query": show_query,
    "why": show_why,
    "report": show_report,
    "watch": show_watch,
    "wandb-workspace": make_wandb_page,
}
