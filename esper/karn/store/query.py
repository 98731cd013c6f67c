"""One SELECT over all runs below a folder, in a process of its own that can neither read, write nor outlast its bounds.

    answer = run_query("select run, state from runs", Path("runs"))

DuckDB's own limits are not enough: a function that works on one value (``repeat``, ``range`` of a list) asks neither
its memory limit nor for an interruption. So the kernel bounds the process's memory, and this one ends it in time.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esper.leyline.errors import ConfigError, RunDirError

KINDS = {"ConfigError": ConfigError, "RunDirError": RunDirError}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """The bounds of a query.

    Fields:
        seconds: of the statement itself; loading the runs takes what it takes.
        memory_mib: of the statement itself, MiB.
        rows: the most rows of an answer.
    """

    seconds: float = 60.0
    memory_mib: int = 2048
    rows: int = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a query came to.

    Fields:
        columns: their names.
        rows: values as plain data: text, numbers, None; times and lists as text.
        more: whether there were more rows than the bound.
        notes: what was passed over while the runs were loaded, one line each.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    more: bool
    notes: tuple[str, ...]


def run_query(sql: str, root: Path, bounds: Bounds | None = None) -> Answer:
    """Answers one SELECT.

    Args:
        sql: exactly one statement, a SELECT by DuckDB's own parser.
        root: the folder below which the runs lie.
        bounds: of time, memory and rows; by default a minute, 2 GiB and 10,000.

    Raises:
        ConfigError: DuckDB is not installed, or the statement is refused, wrong, or goes beyond its bounds.
        RunDirError: there is no such folder.
    """
    bounds = bounds or Bounds()
    asked = {"sql": sql, "root": str(root), "memory_mib": bounds.memory_mib, "rows": bounds.rows}
    command = [sys.executable, "-P", "-m", "esper.karn.store.child"]  # -P: nothing in the working directory is imported
    ours = os.pathsep.join(filter(None, [str(Path(__file__).parents[3]), os.environ.get("PYTHONPATH", "")]))
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "PYTHONPATH": ours},
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(json.dumps(asked).encode())
        child.stdin.close()
        loaded = json.loads(child.stdout.readline() or b'{"lost": true}')
        timed_out = threading.Event()

        def end() -> None:
            timed_out.set()
            child.kill()

        timer = threading.Timer(bounds.seconds, end)
        timer.start()
        try:
            told = child.stdout.read()
        finally:
            timer.cancel()
            child.wait()
        errors.seek(0)
        why = errors.read().decode(errors="replace").strip().splitlines()
    if "error" in loaded:
        raise KINDS[loaded["kind"]](loaded["error"])
    if timed_out.is_set():
        raise ConfigError(f"query: not done after {bounds.seconds:g} s; ask for less, or give it more with --seconds")
    answer = json.loads(told) if told.endswith(b"\n") else {}
    if "lost" in loaded or (not answer and why and "Memory" not in why[-1]):
        raise ConfigError(f"query: its process ended: {why[-1] if why else child.returncode}")
    if not answer:  # the kernel refused it memory, and it could not even say so
        raise ConfigError(f"query: more than {bounds.memory_mib} MiB; ask for less, or give it more with --memory")
    if "error" in answer:
        raise ConfigError(answer["error"])
    rows = tuple(tuple(row) for row in answer["rows"])
    return Answer(columns=tuple(answer["columns"]), rows=rows, more=answer["more"], notes=tuple(loaded["notes"]))
