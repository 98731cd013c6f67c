"""Guards of tables, pages and queries that no other test makes fire."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.karn import html, wandb_workspace
from esper.karn.rows import Metric
from esper.karn.runs import read_run
from esper.karn.store.compact import compact_events
from esper.karn.store.query import Bounds, run_query
from esper.leyline.errors import ConfigError, RunDirError
from esper.leyline.events.task import MetricInfo
from esper.leyline.files import RunDir
from tests.karn.records import record
from tests.karn.test_runs import write_run
from tests.karn.test_store import copy_run
from tests.support.refusals import fails


def infinite(folder: Path) -> None:
    readings = {f"validation_{name}": {"value": math.nan, "tick": 3} for name in ("loss", "accuracy")}
    write_run(folder, tail=[("tick", 3, {**readings, "flops": 30, "parameters": 7})])
    read_run(folder)


def without_flops(folder: Path) -> None:
    write_run(folder, result=lambda whole: {**whole, "flops": None})
    read_run(folder)


def in_the_way(folder: Path) -> None:
    run = copy_run(folder / "run")
    RunDir(run).parquet.mkdir()
    try:
        compact_events(run)
    finally:
        assert not list(run.glob(".*")), "nothing half-written is left"


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            infinite,
            RunDirError,
            r"events\.jsonl: damaged: value is nan; remove .*, and the same command ru",
        ),
        (
            without_flops,
            RunDirError,
            r"no validated ticks with FLOPs in events\.jsonl; run with telemetry\.level=",
        ),
        (in_the_way, RunDirError, r"events\.parquet: not written \(.*directory.*\); queries read the event files inst"),
        (
            lambda tmp: Metric(MetricInfo(name="recall")).value(record([(10, 1.0)])),
            RunDirError,
            r"^RUN: test recall has no value there; this run cannot be compared$",
        ),
        (
            lambda tmp: run_query("select 1", tmp / "none"),
            RunDirError,
            r"none: no such folder; name the folder below which the runs lie$",
        ),
        (
            lambda tmp: run_query("select 1", tmp, Bounds(memory_mib=10**30)),
            ConfigError,
            r"^query: its process ended: ",
        ),
    ],
)
def test_runs_and_queries(call: Callable[[Path], Any], kind: type[Exception], text: str, tmp_path: Path) -> None:
    fails(lambda: call(tmp_path), kind, text)


@pytest.mark.parametrize(
    ("library", "call", "text"),
    [
        ("matplotlib", html.matplotlib, r"^the page needs matplotlib: pip install 'esper\[report\]'$"),
        ("wandb_workspaces", wandb_workspace.library, r"which is not installed: pip install 'esper\[wandb\]'$"),
    ],
)
def test_libraries_that_are_not_installed(
    library: str, call: Callable[[], Any], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    fails(call, ConfigError, text)
