"""What a long command has played is kept: it goes on, in spite of a torn line, and refuses another version's record."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.commands import environment
from tests.support.dist import ROOT
from tests.support.patience import run_patiently


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    return importlib.import_module("soaking.record")


def test_lines_come_back_and_a_torn_one_costs_itself_alone(record: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "rounds"
    assert record.read_lines(file, "a") == []
    record.add_line(file, "a", number=1)
    with file.open("a") as stream:
        stream.write('{"code": "a", "numb')
    assert record.read_lines(file, "a") == [{"code": "a", "number": 1}]
    record.add_line(file, "a", number=2)
    assert [line["number"] for line in record.read_lines(file, "a")] == [1, 2]


@pytest.mark.parametrize("line", ['{"code": "b", "number": 1}\n', '{"number": 1}\n'])
def test_other_sources_are_refused(record: ModuleType, tmp_path: Path, line: str) -> None:
    file = tmp_path / "rounds"
    file.write_text(line)
    with pytest.raises(record.OtherCode, match=r"was recorded with other sources \(digest (b|None), now a\); go back"):
        record.read_lines(file, "a")


def test_a_changed_source_is_other_code(record: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    (tmp_path / "esper").mkdir()
    source = tmp_path / "esper" / "x.py"
    found = set()
    for text in ("a = 1\n", "a = 2\n"):
        source.write_text(text)
        found.add(record.sources_digest())
    source.rename(source.with_name("y.py"))
    assert len({*found, record.sources_digest()}) == 3


@pytest.mark.slow
def test_the_matrix_goes_on_where_it_stopped(tmp_path: Path) -> None:
    file = tmp_path / "cells"
    words = [sys.executable, str(ROOT / "launch" / "matrix.py"), "--record", str(file), "--only", "restart budget"]
    for played in (1, 0):
        done = run_patiently(words, env=environment(tmp_path))
        assert done.returncode == 1, "cells of other rows are left"
        assert re.search(r"(?m)^1 of \d\d cells: 1 passed, 0 failed, 0 skipped", done.stdout), done.stdout + done.stderr
        assert done.stdout.count("passed, ") - 1 == played, done.stdout
    assert '"attempts": [null, ' in file.read_text()
    file.write_text(file.read_text().replace('"code": "', '"code": "0'))
    refused = run_patiently(words, env=environment(tmp_path))
    assert (refused.returncode, refused.stderr.count("\n")) == (78, 1), refused.stderr
