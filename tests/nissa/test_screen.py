"""Streams that never fail: every way in which a print can raise leaves the program as it was."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.nissa.screen import plain_text, safe

SCRIPT = """
import os, sys
from esper.nissa.screen import safe_streams
with safe_streams():
    from rich.console import Console
    for _ in range(3):
        print("loss 0.1 ± 0.2", flush=True)
        print("to stderr ± ", file=sys.stderr)
        Console(file=sys.stdout).print("━ 50 %")
    opened = os.open(os.devnull, os.O_RDONLY)
sys.exit(10 + (opened > 2))
"""


@pytest.mark.parametrize(
    ("encoding", "end"),
    [
        *(("ascii", end) for end in ("", ">&-", "2>&-", ">&- 2>&- <&-", ">/dev/full 2>/dev/full")),
        *(("utf-8", end) for end in ("", ">/dev/full 2>/dev/full", "| true", "2>&1 | head -c 1")),
        ("latin-1", ""),
    ],
)
def test_a_program_goes_on_whatever_becomes_of_its_output(end: str, encoding: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    line = f'set -o pipefail; "{sys.executable}" "{script}" {end}'
    done = subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == 11, done.stderr
    if not end:
        sign = {"utf-8": "±", "ascii": "+-", "latin-1": "±"}[encoding]
        assert done.stdout.decode(encoding).count(f"loss 0.1 {sign} 0.2") == 3
    assert b"Error" not in done.stderr


def test_signs_that_have_a_spelling_get_it_and_others_a_question_mark() -> None:
    assert plain_text("a ± b · c → d 漢", "ascii") == "a +- b - c -> d ?"
    assert plain_text("a ± b · c → d 漢", "latin-1") == "a ± b · c -> d ?"


def test_a_closed_stream_and_none_take_everything() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        print("nothing", file=safe(stream), flush=True)
    assert safe(safe(sys.stdout)) is not None
