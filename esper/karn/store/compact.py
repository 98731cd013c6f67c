"""Compacts the events of a run that is over to one Parquet file, beside the event files, which stay the truth."""

import os
import secrets
import tempfile
from pathlib import Path

from esper.karn.store.finding import FoundRun
from esper.karn.store.loading import EVENT, LINES, SOURCES, connect, duckdb, source_sizes, write_lines
from esper.leyline.errors import EsperError, RunDirError, one_line
from esper.leyline.files import RunDir, sync

WORTH_BYTES = 1 << 20  # of event files; shorter ones are read as fast


def compact_if_worth(folder: Path) -> str | None:
    """Compacts the events of a run that is over, where there are enough of them; never fails.

    Returns:
        What to tell the user, where it was not done although it would have been worth it; else None.
    """
    try:
        sizes = [path.stat().st_size for path in FoundRun(name=".", path=folder).event_files()]
        if sum(sizes) >= WORTH_BYTES:
            compact_events(folder)
    except (EsperError, OSError) as error:
        return f"no {RunDir(folder).parquet.name}: {one_line(error)}"
    return None


def compact_events(folder: Path) -> Path:
    """Writes RUN/events.parquet, whole or not at all; returns its path.

    Args:
        folder: RUN, on which nobody works any more.

    Raises:
        ConfigError: DuckDB is not installed.
        RunDirError: the events are damaged, or the file cannot be written.
    """
    database = connect()
    run, target = FoundRun(name=".", path=folder), RunDir(folder).parquet
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with tempfile.TemporaryDirectory(prefix="esper-compact-") as place:
            lines, sizes = Path(place) / "events.jsonl", source_sizes(run)
            write_lines(run, lines)
            quoted = [text.replace("'", "''") for text in (str(lines), str(temporary), sizes)]
            database.execute(
                f"copy (select {EVENT} from read_json('{quoted[0]}', format='newline_delimited', columns={LINES})) "
                f"to '{quoted[1]}' (format parquet, compression zstd, kv_metadata {{{SOURCES}: '{quoted[2]}'}})"
            )
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except (OSError, duckdb().Error) as error:
        why = str(error).splitlines()[0]
        raise RunDirError(f"{target}: not written ({why}); queries read the event files instead") from None
    finally:
        temporary.unlink(missing_ok=True)
        database.close()
    return target
