"""Fills an in-memory DuckDB with all runs below a folder, and shuts it: then it reads no file and loads no code.

A run that is over has `events.parquet` (`esper.karn.store.compact`), which is read instead of its event files where it
stands for the very same bytes.
"""

import json
import tempfile
from dataclasses import astuple
from pathlib import Path
from typing import Any

from esper.karn.lives import Life, LivesReader, by_birth, last_look
from esper.karn.store.digest import read_digest
from esper.karn.store.facts import collect_facts
from esper.karn.store.finding import FoundRun, find_runs
from esper.karn.store.views import VIEWS
from esper.leyline.errors import ConfigError, RunDirError, one_line
from esper.leyline.stages import Stage
from esper.nissa.jsonl import encode
from esper.nissa.reading import EventFile, LatestRecords

SOURCES = "esper_sources"  # key of the sizes of the event files that a Parquet file was made from
LINES = "{run: 'VARCHAR', current: 'BOOLEAN', record: 'JSON'}"
EVENT = """run, (record->>'$.attempt')::integer as attempt, make_timestamp(((record->>'$.time')::double * 1e6)::bigint)
    as time, (record->>'$.step')::bigint as step, (record->>'$.tick')::bigint as tick, (record->>'$.epoch')::bigint as
    epoch, (record->>'$.rank')::integer as rank, (record->>'$.seq')::bigint as seq, record->>'$.kind' as kind, current,
    record->'$.payload' as payload"""


def duckdb() -> Any:
    """Imports DuckDB.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import duckdb as module
    except ImportError:
        raise ConfigError("this needs DuckDB, which is not installed: pip install 'esper[store]'") from None
    return module


def connect(memory_mib: int = 1024) -> Any:
    """An empty database in memory, without extensions of others, which never spills to disk.

    Args:
        memory_mib: the most memory that DuckDB itself may take, in MiB.
    """
    settings = {
        "autoinstall_known_extensions": "false",
        "autoload_known_extensions": "false",
        "allow_community_extensions": "false",
        "python_enable_replacements": "false",
        "memory_limit": f"{memory_mib}MiB",
        "threads": "2",
        "preserve_insertion_order": "true",
    }
    return duckdb().connect(":memory:", config=settings)


def shut(database: Any) -> None:
    """From here on it reads and writes no file, loads no extension, and its settings cannot be changed."""
    for setting in ("temp_directory = ''", "enable_external_access = false", "lock_configuration = true"):
        database.execute(f"set {setting}")


def source_sizes(run: FoundRun) -> str:
    """Name and size of each event file of a run, as text: what a Parquet file stands for."""
    return json.dumps({path.name: path.stat().st_size for path in run.event_files()}, sort_keys=True)


def write_lines(run: FoundRun, to: Path) -> None:
    """Writes every record of a run as a line that DuckDB reads, marked with whether it is current.

    Raises:
        RunDirError: an event file was damaged.
    """
    with to.open("ab") as out:
        for path in run.event_files():
            of_rank_0 = path == run.directory.events
            judged = LatestRecords(path).judged() if of_rank_0 else ((record, True) for record in EventFile(path))
            for record, current in judged:
                out.write(encode({"run": run.name, "current": current, "record": record}))


def load(database: Any, root: Path) -> list[str]:
    """Loads all runs below a folder and makes the views.

    Returns:
        A line for each thing that was passed over, cannot be read, or was torn.

    Raises:
        RunDirError: there is no such folder.
    """
    found = find_runs(root)
    notes = list(found.skipped)
    columns = ", ".join(f"{name} {kind}" for name, (kind, _) in VIEWS["events"].columns.items())
    database.execute(f"create table events ({columns})")
    for name in ("runs", "births"):
        columns = ", ".join(f"{column} {kind}" for column, (kind, _) in VIEWS[name].columns.items())
        database.execute(f"create table {name} ({columns})")
    with tempfile.TemporaryDirectory(prefix="esper-query-") as folder:
        lines = Path(folder) / "events.jsonl"
        lines.touch()
        for run in found.runs:
            notes += _load_run(database, run, lines)
        database.execute(
            f"insert into events select {EVENT} from read_json(?, format='newline_delimited', columns={LINES})",
            [str(lines)],
        )
    for name, view in VIEWS.items():
        if view.sql:
            database.execute(f"create view {name} as select {', '.join(view.columns)} from ({view.sql})")
    return notes


def _load_run(database: Any, run: FoundRun, lines: Path) -> list[str]:
    """Loads one run; returns what has to be said of it."""
    before = lines.stat().st_size
    try:
        born: list[tuple[tuple[int, int], tuple[Any, ...]]] = []
        reader = LivesReader(lambda life: born.append((by_birth(life), _birth(run.name, life))), most_looks=1)
        digest = read_digest(run, reader.take)
        born += [(by_birth(life), _birth(run.name, life)) for life in reader.present.values()]
        rows = [astuple(collect_facts(run, digest))]
        if not _load_parquet(database, run):
            write_lines(run, lines)
    except RunDirError as error:
        with lines.open("ab") as out:
            out.truncate(before)
        return [f"left out: {one_line(error)}"]
    _insert(database, "runs", rows)
    _insert(database, "births", [row for _, row in sorted(born, key=lambda pair: pair[0])])
    return [f"{run.name}: {digest.torn} torn lines passed over"] if digest.torn else []


def _load_parquet(database: Any, run: FoundRun) -> bool:
    """Loads events.parquet if it stands for the event files as they are now; returns whether it did."""
    path = run.directory.parquet
    if not path.is_file() or path.is_symlink():
        return False
    try:
        found = database.execute(
            "select decode(value) from parquet_kv_metadata(?) where decode(key) = ?", [str(path), SOURCES]
        ).fetchone()
        if found is None or found[0] != source_sizes(run):
            return False
        names = ", ".join("? as run" if name == "run" else name for name in VIEWS["events"].columns)
        database.execute(f"insert into events select {names} from read_parquet(?)", [run.name, str(path)])
    except duckdb().Error as error:
        raise RunDirError(f"{path}: not readable ({str(error).splitlines()[0]}); remove it") from None
    return True


def _insert(database: Any, table: str, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        database.executemany(f"insert into {table} values ({', '.join('?' * len(rows[0]))})", rows)


def _birth(run: str, life: Life) -> tuple[Any, ...]:
    """One row of ``births``."""
    end, joined, look = life.end, life.reached(Stage.BLENDING), last_look(life)
    asked, ended = life.command_of(life.birth), end and life.command_of(end)
    running = look["running"] if look else {}
    return (
        run,
        life.slot,
        life.generation,
        life.blueprint,
        life.proposal,
        life.birth["step"],
        life.birth["tick"],
        asked and asked["payload"]["reason"],
        joined and joined["step"],
        life.stage.name,
        life.fate,
        end and end["step"],
        end and end["payload"]["cause"],
        ended and ended["payload"]["reason"],
        life.looks,
        running.get("value"),
        running.get("se"),
    )
