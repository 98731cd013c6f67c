"""The process of a query: loads the runs, shuts the database, bounds its own memory, and answers one SELECT.

In: one JSON object (``sql``, ``root``, ``memory_mib``, ``rows``). Out: a line when the runs are loaded, a line with the
answer. `esper.karn.store.query` starts it, and ends it when time is up.
"""

import json
import math
import re
import resource
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from esper.karn.store.loading import connect, duckdb, load, shut
from esper.karn.store.views import VIEWS
from esper.leyline.errors import EsperError


def refuse(database: Any, sql: str) -> str | None:
    """Why a text is not one SELECT; None if it is."""
    module = duckdb()
    try:
        statements = database.extract_statements(sql)
    except module.Error as error:
        return _first(error)
    if len(statements) != 1:
        return f"{len(statements)} statements; give exactly one, a SELECT"
    kind = statements[0].type
    return None if kind == module.StatementType.SELECT else f"{kind.name} is not allowed; give a SELECT"


def _first(error: Exception) -> str:
    return " ".join(str(error).split("\n\n")[0].split())[:400]


def _columns_of(sql: str) -> str:
    """The columns of the views that a statement names, or the views where it names none."""
    named = [name for name in VIEWS if re.search(rf"\b{name}\b", sql)]
    if not named:
        return f"views are {', '.join(VIEWS)}"
    return "; ".join(f"{name} has {', '.join(VIEWS[name].columns)}" for name in named)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return value.isoformat(sep=" ") if isinstance(value, datetime) else str(value)


def bound_memory(mib: int) -> None:
    """Lets this process take so much more memory than it has now, in MiB; the kernel refuses it any more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:  # elsewhere only DuckDB's own limit binds
        most = pages * resource.getpagesize() + (mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def answer(database: Any, sql: str, rows: int) -> dict[str, Any]:
    """Runs a statement; returns names and rows, or the error."""
    if why := refuse(database, sql):
        return {"error": f"query: {why}"}
    try:
        result = database.execute(sql)
        found = result.fetchmany(rows + 1)
        columns = [column[0] for column in result.description]
    except MemoryError:
        return {"error": "query: out of memory; ask for less, or give it more with --memory"}
    except duckdb().Error as error:
        return {"error": f"query: {_first(error)}; {_columns_of(sql)}"}
    return {"columns": columns, "rows": [[_plain(v) for v in row] for row in found[:rows]], "more": len(found) > rows}


def main() -> None:
    """Reads the question, says when the runs are loaded, and answers."""
    asked = json.loads(sys.stdin.buffer.read())
    try:
        database = connect(asked["memory_mib"])
        notes = load(database, Path(asked["root"]))
    except EsperError as error:
        kind = "ConfigError" if error.exit_code == 78 else "RunDirError"
        print(json.dumps({"error": str(error), "kind": kind}), flush=True)
        return
    shut(database)
    print(json.dumps({"notes": notes}), flush=True)
    bound_memory(asked["memory_mib"])
    try:
        told = json.dumps(answer(database, asked["sql"], asked["rows"]))
    except MemoryError:
        told = json.dumps({"error": "query: out of memory; ask for less, or give it more with --memory"})
    print(told, flush=True)


if __name__ == "__main__":
    main()
