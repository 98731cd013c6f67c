"""A run is what it did, whatever becomes of what it prints: another encoding, a reader that went, no output at all."""

import json
import shlex
from pathlib import Path

import pytest

from esper.leyline.events import RunEnded
from esper.nissa.reading import read_events
from tests.e2e.conftest import Start
from tests.support.commands import ESPER, NO_WANDB
from tests.support.dist import ROOT

RECORDED = ROOT / "tests" / "karn" / "recorded" / "grown"
SHORT = ("experiment=demo", "trainer.steps=20", "control.every=10", "world.nproc_per_node=1", NO_WANDB, "run.dir=run")


@pytest.mark.parametrize(
    ("encoding", "end"),
    [
        ("ascii", "2>&-"),
        pytest.param("latin-1", "", marks=pytest.mark.slow),  # each end: tests/nissa/test_screen.py, too
        ("utf-8", "2>&1 | head -n 2"),
        pytest.param("utf-8", ">&- 2>&-", marks=pytest.mark.slow),  # one of the two: above
        pytest.param("utf-8", ">/dev/full 2>/dev/full", marks=pytest.mark.slow),  # the same
    ],
)
def test_a_finished_run_is_done(start: Start, tmp_path: Path, encoding: str, end: str) -> None:
    line = f"set -o pipefail; {shlex.join([*ESPER, 'train', *SHORT])} {end}"
    command = start(["bash", "-c"], line, PYTHONIOENCODING=encoding)
    assert command.end() == 0, command.told()
    status = json.loads((tmp_path / "run" / "STATUS.json").read_text())
    assert (status["status"], status["exit_code"]) == ("done", 0)
    assert isinstance(status["objective"], float)
    ended = [record for record in read_events(tmp_path / "run" / "events.jsonl") if record["kind"] == RunEnded.kind]
    assert [record["payload"]["status"] for record in ended] == ["done"]
    if end in ("", "2>&-"):
        sign = {"ascii": "-", "latin-1": "·"}[encoding]
        out = next(tmp_path.glob("command-*.out")).read_bytes().decode(encoding)
        assert f"Run done {sign} 20 steps" in out
        assert command.err == ""
    assert (tmp_path / "run" / "lock").read_text().startswith("process "), "no text of the ranks in it"


def test_a_table_goes_to_any_encoding_and_any_reader(start: Start) -> None:
    line = f"set -o pipefail; {shlex.join([*ESPER, 'why', str(RECORDED)])} | true"
    command = start(["bash", "-c"], line, PYTHONIOENCODING="latin-1")
    assert command.end() == 0, command.told()
    assert command.err == ""
