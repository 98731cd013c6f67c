"""The store: every run below a folder and nothing outside it, one SELECT and nothing else, within bounds that hold."""

import hashlib
import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from esper.karn.commands import LOOKING
from esper.karn.store import compact, views
from esper.karn.store.child import answer, refuse
from esper.karn.store.digest import read_digest
from esper.karn.store.facts import collect_facts
from esper.karn.store.finding import FoundRun, find_runs
from esper.karn.store.listing import list_runs, runs_table, visible
from esper.karn.store.loading import connect, load, shut
from esper.karn.store.query import Bounds, run_query
from esper.leyline.errors import ConfigError, RunDirError
from esper.leyline.evidence import SeedWorth, measured
from esper.leyline.files import RunDir
from esper.leyline.stages import Stage
from esper.nissa.envelope import Envelope
from esper.nissa.jsonl import encode
from esper.nissa.reading import EventFile, keep_latest, read_events
from tests.nissa.samples import SAMPLES, fault, run_started, stage_changed, tick_done
from tests.support.dist import ROOT

RECORDED = Path(__file__).parent / "recorded" / "grown"


def copy_run(to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(RECORDED, to)
    os.utime(RunDir(to).status)  # the last word comes last, in whatever order a checkout wrote the files
    return to


def write_run(folder: Path, *attempts: list[Any], torn: str = "", status: dict[str, Any] | None = None) -> Path:
    """A run with these events, an attempt each."""
    folder.mkdir(parents=True)
    shutil.copy(RECORDED / "config.yaml", folder)
    lines = []
    for number, events in enumerate(attempts, start=1):
        envelope = Envelope("0badcafe", number, 0)
        lines += [encode(envelope.to_record(event)) for event in events]
    RunDir(folder).events.write_bytes(b"".join(lines) + torn.encode())
    RunDir(folder).attempt.write_text(json.dumps({"run_id": "0badcafe", "number": len(attempts)}))
    if status:
        RunDir(folder).status.write_text(json.dumps(status))
    return folder


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The recorded run and one of every kind of event, loaded and shut."""
    root = tmp_path_factory.mktemp("runs")
    copy_run(root / "demo" / "grown")
    told = tick_done(8)
    worth = SeedWorth(shapley=measured(0.02, tick=8, n=128, se=0.004))
    told = replace(told, slots=(replace(told.slots[0], worth=worth),))
    write_run(root / "all", [*(event for event in SAMPLES if event.kind != "rollback"), told])
    write_run(root / "back", [event for event in SAMPLES if event.kind == "rollback"])
    made = connect()
    assert load(made, root) == []
    shut(made)
    return made


def rows(database: Any, sql: str) -> list[list[Any]]:
    told = answer(database, sql, 10_000)
    assert "error" not in told, told
    found: list[list[Any]] = told["rows"]
    return found


def test_every_view_has_the_columns_that_it_documents_and_rows(database: Any) -> None:
    for name, view in views.VIEWS.items():
        told = answer(database, f"select * from {name}", 10_000)
        assert told["columns"] == list(view.columns), name
        assert told["rows"], name
        for index, column in enumerate(view.columns):
            if name != "runs":
                assert any(row[index] is not None for row in told["rows"]), f"{name}.{column} is always null"


def test_the_page_has_the_views_as_they_are() -> None:
    page = (ROOT / "docs" / "store.md").read_text()
    assert page.split("## Views\n\n")[1] == views.reference(), "python -m esper.karn.store.views"


def test_views_say_what_the_record_says(database: Any) -> None:
    records = keep_latest(read_events(RECORDED / "events.jsonl"))
    ticks = [record for record in records if record["kind"] == "tick"]
    found = rows(database, "select tick, validation_loss, flops from ticks where run = 'demo/grown' order by tick")
    assert found == [[r["tick"], r["payload"]["validation_loss"]["value"], r["payload"]["flops"]] for r in ticks]
    found = rows(database, "select tick, slot, stage from slots where run = 'demo/grown' order by tick, slot")
    wanted = sorted([r["tick"], line["slot"], line["stage"]] for r in ticks for line in r["payload"]["slots"])
    assert found == wanted
    sql = "select op, slot, applied, outcome from decisions where run = 'demo/grown' order by proposal"
    found = rows(database, sql)
    assert found[0] == ["GERMINATE", "r0c0", True, "GERMINATED"]
    assert found[-1] == ["FOSSILIZE", "r0c0", True, "FOSSILIZED"]
    births = rows(database, "select slot, fate, looks, born_step, ended_step from births where run = 'demo/grown'")
    assert births == [["r0c0", "fossilised", 5, 36, 180], ["r0c1", "pruned", 2, 48, 132]]
    failed = rows(database, "select failed from gates where not passed")
    assert failed == [["contribution: 0.001 ± 0.004"]]
    kinds = {row[0] for row in rows(database, "select kind from faults")}
    assert {"fault", "panic", "rollback", "breaker", "skipped", "veto", "degraded"} <= kinds
    assert rows(database, "select count(*) from faults where what is null") == [[0]]
    facts = rows(database, "select state, step, validation_accuracy, fossils from runs where run = 'demo/grown'")
    assert facts == [["done", 240, 0.7666666666666667, 1]]


NOT_A_SELECT = (
    "copy runs to '{}/out.csv'",
    "attach '{}/out.db' as other",
    "set memory_limit = '1TB'",
    "pragma database_list",
    "install httpfs",
    "load httpfs",
    "insert into runs (run) values ('x')",
    "create table x as select 1",
    "drop table runs",
    "export database '{}/out'",
    "call pragma_version()",
    "explain select 1",
    "use memory",
    "select 1; select 2",
    "select 1; copy runs to '{}/out.csv'",
    "",
    "-- nothing",
    "selec 1",
)
OUTSIDE = (
    "select * from read_text('{}')",
    "select * from read_blob('{}')",
    "select * from sniff_csv('{}')",
    "select * from read_csv('{}')",
    "select * from read_json('{}')",
    "select * from read_parquet('{}')",
    "select * from parquet_kv_metadata('{}')",
    "select * from glob('/*')",
    "select * from '{}'",
    "select * from query('copy runs to ''{}''')",
    "select getenv('HOME')",
    "select * from database",
)


@pytest.mark.parametrize("sql", NOT_A_SELECT)
def test_what_is_not_one_select_is_refused(database: Any, tmp_path: Path, sql: str) -> None:
    assert refuse(database, sql.format(tmp_path)) is not None
    assert "error" in answer(database, sql.format(tmp_path), 10)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_column_names_those_that_there_are(database: Any) -> None:
    told = answer(database, "select verdict from decisions", 10)
    assert "decisions has" in told["error"]
    assert "applied, reason" in told["error"]


@pytest.mark.parametrize("sql", OUTSIDE)
def test_a_select_reaches_nothing_outside(database: Any, tmp_path: Path, sql: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("a,b\n1,2\n")
    told = answer(database, sql.format(secret), 10)
    assert "error" in told, told
    assert list(tmp_path.iterdir()) == [secret]


@pytest.mark.parametrize("sql", [sql for sql in NOT_A_SELECT if not sql.startswith(("select", "selec", "-")) and sql])
def test_the_database_is_shut_even_to_what_is_no_select(database: Any, tmp_path: Path, sql: str) -> None:
    """The second wall, should a later DuckDB call something else a SELECT: no file, no extension, no setting."""
    harmless = ("pragma", "insert", "create", "drop", "call", "explain", "use")
    if not sql.startswith(harmless):
        with pytest.raises(Exception, match=r"disabled|locked"):
            database.execute(sql.format(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("select repeat('x', 3000000000)", "Out of Memory|MiB; ask for less"),
        ("select list_sum(range(1000000000))", "Out of Memory|MiB; ask for less"),
        ("select count(*) from range(1000000000000)", "not done after 0.5 s"),
    ],
)
def test_bounds_of_time_and_memory_hold(tmp_path: Path, sql: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run_query(sql, tmp_path, Bounds(seconds=0.5 if "count" in sql else 60.0, memory_mib=256))


def test_an_answer_has_so_many_rows_and_says_that_there_were_more(tmp_path: Path, monkeypatch: Any) -> None:
    """In a folder that holds a module called esper, and one that hides one of Python's: neither is imported."""
    copy_run(tmp_path / "a")
    for name in ("esper", "json"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('foreign code ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)  # one that holds "." asks for it
    told = run_query("select tick, 'nan'::double, time from ticks order by tick", tmp_path, Bounds(rows=3))
    assert [row[:2] for row in told.rows] == [(1, "nan"), (2, "nan"), (3, "nan")]
    assert told.more


def test_links_that_lead_out_are_skipped_and_said(tmp_path: Path) -> None:
    outside = copy_run(tmp_path / "outside" / "run")
    root = tmp_path / "root"
    inside = copy_run(root / "a" / "run")
    (root / "folder").symlink_to(outside.parent)
    (root / "again").symlink_to(inside)
    other = write_run(root / "b", [run_started()])
    RunDir(other).events.unlink()
    RunDir(other).events.symlink_to(outside / "events.jsonl")
    third = write_run(root / "c", [run_started()])
    os.mkfifo(third / "events-rank-00001.jsonl")
    found = find_runs(root)
    assert [run.name for run in found.runs] == ["a/run", "b", "c"]
    assert len(found.skipped) == 3
    assert sum("leads out" in line for line in found.skipped) == 2
    assert found.runs[1].event_files() == []
    database = connect()
    assert load(database, root) == list(found.skipped)
    assert database.execute("select run, count(*) from events group by run order by run").fetchall() == [
        ("a/run", 77),
        ("c", 1),
    ]


def test_attempts_are_collapsed_to_the_newest_and_a_torn_line_is_counted(tmp_path: Path) -> None:
    first = [run_started(), *(tick_done(tick) for tick in range(1, 8)), fault(7)]
    second = [run_started(step=50, resumed_from=50), *(tick_done(tick) for tick in range(6, 11))]
    folder = write_run(tmp_path / "run", first, second, torn='{"schema":2,"run_id"')
    database = connect()
    assert load(database, tmp_path) == ["run: 1 torn lines passed over"]
    sql = "select tick, attempt from ticks order by tick"
    wanted = [(tick, 1 if tick <= 5 else 2) for tick in range(1, 11)]
    assert database.execute(sql).fetchall() == wanted
    assert database.execute("select count(*), sum(current::int) from events").fetchone() == (15, 13)
    assert database.execute("select torn_lines, attempts, step from runs").fetchone() == (1, 2, 100)
    assert database.execute("select count(*) from faults").fetchone() == (1,)
    file = EventFile(RunDir(folder).events)
    assert len(list(file)) == 14 + 1
    assert file.torn == 1


def test_a_damaged_run_is_left_out_and_said(tmp_path: Path) -> None:
    whole, damaged = copy_run(tmp_path / "a"), copy_run(tmp_path / "b")
    lines = RunDir(damaged).events.read_bytes().split(b"\n")
    RunDir(damaged).events.write_bytes(b"\n".join([*lines[:5], b"{", *lines[5:]]))
    database = connect()
    notes = load(database, tmp_path)
    assert len(notes) == 1
    assert "events.jsonl:6: not an event record" in notes[0]
    assert database.execute("select distinct run from events").fetchall() == [(whole.name,)]
    assert len(list_runs(tmp_path)[0]) == 1


def test_the_parquet_file_is_the_events_and_is_passed_over_when_they_went_on(tmp_path: Path) -> None:
    folder = copy_run(tmp_path / "it's here")
    before, after = connect(), connect()
    load(before, tmp_path)
    compact.compact_events(folder)
    assert sorted(p.name for p in folder.glob(".*")) == []
    line = RunDir(folder).events.read_bytes()
    RunDir(folder).events.write_bytes(line.replace(b'"rank":0', b'"rank":7'))  # as long: the Parquet file is read
    load(after, tmp_path)
    everything = "select * from events order by seq"
    assert after.execute(everything).fetchall() == before.execute(everything).fetchall()
    RunDir(folder).events.write_bytes(line + line.splitlines(keepends=True)[-1].replace(b'"seq":76', b'"seq":99'))
    grown = connect()
    load(grown, tmp_path)
    assert grown.execute("select max(seq), count(*) from events").fetchone() == (99, 78)


def test_short_runs_are_not_compacted_and_without_duckdb_it_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    folder = copy_run(tmp_path / "run")
    assert compact.compact_if_worth(folder) is None
    assert not RunDir(folder).parquet.exists()
    monkeypatch.setattr(compact, "WORTH_BYTES", 1000)
    monkeypatch.setitem(__import__("sys").modules, "duckdb", None)
    told = compact.compact_if_worth(folder)
    assert told is not None
    assert "pip install 'esper[store]'" in told
    assert not RunDir(folder).parquet.exists()
    monkeypatch.undo()
    monkeypatch.setattr(compact, "WORTH_BYTES", 1000)
    assert compact.compact_if_worth(folder) is None
    assert RunDir(folder).parquet.exists()


@pytest.mark.parametrize(
    ("status", "state"),
    [({"status": "failed", "message": "why\nmore", "step": 3}, "failed"), ({}, "lost"), (None, "prepared")],
)
def test_the_state_of_a_run(tmp_path: Path, status: dict[str, Any] | None, state: str) -> None:
    folder = write_run(tmp_path / "run", [run_started(), stage_changed(3, Stage.EMPTY, Stage.GERMINATED)])
    if status is None:
        RunDir(folder).attempt.write_text("{}")
    elif status:
        RunDir(folder).status.write_text(json.dumps(status))
    run = FoundRun(name="run", path=folder)
    facts = collect_facts(run, read_digest(run))
    assert (facts.state, facts.live_seeds, facts.births, facts.slots) == (state, 1, 1, 2)
    if state == "failed":
        assert (facts.step, facts.last_word) == (3, "why")
    else:
        assert facts.last_word == "step 30  r0c0 EMPTY -> GERMINATED conv_light (ADVANCE)"


def test_a_run_that_is_going_on_is_seen_without_a_lock(tmp_path: Path) -> None:
    import fcntl

    folder = write_run(tmp_path / "run", [run_started()], status={"status": "failed", "message": "", "step": 3})
    run = FoundRun(name="run", path=folder)
    assert collect_facts(run, read_digest(run)).state == "failed"
    with RunDir(folder).lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert collect_facts(run, read_digest(run)).state == "running"
    assert collect_facts(run, read_digest(run)).state == "failed"
    (folder / "heartbeat").mkdir()
    mark = folder / "heartbeat" / "rank-00000"
    mark.write_text("[]")
    os.utime(mark, (time.time() + 10, time.time() + 10))  # on another machine
    assert collect_facts(run, read_digest(run)).state == "running"


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() + str(path.stat().st_mtime_ns) for path in files}


def test_the_commands_print_and_leave_every_byte_as_it_was(tmp_path: Path, capsys: Any) -> None:
    import argparse

    copy_run(tmp_path / "runs" / "one")
    before = _digest(tmp_path)
    assert LOOKING["runs"](argparse.Namespace(root=tmp_path / "runs", json=False)) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("one", "done", "240/240", "0.7654", "1 kept, 0 alive of 3", "1.51 GFLOP"))
    given = {"root": tmp_path / "runs", "format": "csv", "rows": 10, "seconds": 60.0, "memory": 1024}
    assert LOOKING["query"](argparse.Namespace(sql="select slot, fate from births order by slot", **given)) == 0
    assert capsys.readouterr().out == "slot,fate\nr0c0,fossilised\nr0c1,pruned\n"
    assert _digest(tmp_path) == before
    with pytest.raises(RunDirError, match="no such folder"):
        list_runs(tmp_path / "nowhere")


def test_a_record_cannot_steer_the_terminal(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [run_started(), fault(1, what="\x1b[2J\x1b]0;owned\x07")])
    assert "\x1b" not in visible("\x1b[2J")
    shown = [cell for column in runs_table(list_runs(folder.parent)[0]).columns for cell in column.cells]
    assert all("\x1b" not in str(cell) for cell in shown)
