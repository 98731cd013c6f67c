"""The soak command, briefly: it kills, compares, and says so."""

import re
import sys
from pathlib import Path

import pytest

from tests.support.commands import environment
from tests.support.dist import ROOT
from tests.support.patience import run_patiently


@pytest.mark.slow
def test_two_random_kills_come_to_the_same_bits(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "launch" / "soak.py"), "--kills", "2", "--minutes", "5", "--seed", "3"]
    words += ["--record", str(tmp_path / "rounds.jsonl")]
    done = run_patiently(words, env=environment(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(?m)^2 kills in \d+ runs, 0 failed", done.stdout), done.stdout
    assert len(re.findall(r"(?m)^round \d+: SIG", done.stdout)) == 2
    again = run_patiently(words, env=environment(tmp_path))
    assert re.search(r"(?m)^2 kills in \d+ runs, 0 failed", again.stdout), again.stdout
    assert "round" not in again.stdout, "all of them had been played"
