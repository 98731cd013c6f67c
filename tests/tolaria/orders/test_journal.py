"""The journal: sealed line by line, torn only at its end, and read back at each order's own tick."""

import errno
import os
from pathlib import Path

import pytest

from esper.leyline.errors import RunDirError
from esper.leyline.files import append_synced
from esper.tolaria.orders.journal import Journal
from tests.support.orders import order_of

KEY = bytes(32)


def written(path: Path) -> Journal:
    journal = Journal(path, KEY)
    journal.append([order_of("pause"), order_of("advance", "r0c0")], tick=3, rollbacks=0, attempt=1)
    journal.append([order_of("resume")], tick=5, rollbacks=0, attempt=1)
    journal.append([order_of("advance", "r0c1")], tick=3, rollbacks=1, attempt=2)
    return journal


def test_orders_are_read_back_at_their_own_ticks(tmp_path: Path) -> None:
    for journal in (written(tmp_path / "j"), Journal(tmp_path / "j", KEY)):
        assert [(e.number, e.order.command) for e in journal.at(3, 0)] == [(1, "pause"), (2, "advance")]
        assert [e.number for e in journal.at(3, 1)] == [1, 2, 4]
        assert [e.number for e in journal.at(5, 0)] == [3]
        assert journal.at(4, 0) == []


def test_a_torn_last_line_goes_a_changed_one_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "j"
    written(path)
    whole = path.read_bytes()
    for cut in (1, 5, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        journal = Journal(path, KEY)
        assert journal.count == 3
        assert "torn" in capsys.readouterr().err
        journal.append([order_of("stop", after=0)], tick=9, rollbacks=0, attempt=2)
        assert Journal(path, KEY).count == 4
    lines = whole.splitlines(keepends=True)
    for changed in (
        whole.replace(b'"tick":5', b'"tick":6'),
        b"".join([lines[0], *lines[2:]]),
        b"".join([lines[1], lines[0], *lines[2:]]),
        lines[0] + b"{}\n" + b"".join(lines[1:]),
        b"rubbish\n",
    ):
        path.write_bytes(changed)
        with pytest.raises(RunDirError, match="restore it from a copy"):
            Journal(path, KEY)
    path.write_bytes(whole)
    with pytest.raises(RunDirError, match="line 1 is not sealed by this run's key"):
        Journal(path, bytes(31) + b"1")


def test_where_the_disk_refuses_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, calls = written(tmp_path / "j"), []

    def full(handle: int) -> None:
        calls.append(handle)
        raise OSError(errno.ENOSPC, "No space left on device")

    before = (tmp_path / "j").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        journal.append([order_of("pause")], tick=7, rollbacks=0, attempt=1)
    monkeypatch.undo()
    assert calls
    assert (tmp_path / "j").read_bytes() == before
    assert journal.at(7, 9) == []
    journal.append([order_of("pause")], tick=8, rollbacks=0, attempt=1)
    assert Journal(tmp_path / "j", KEY).count == 5


def test_an_append_makes_the_file_for_its_owner(tmp_path: Path) -> None:
    append_synced(tmp_path / "a", b"1\n", mode=0o600)
    append_synced(tmp_path / "a", b"2\n", mode=0o600)
    assert (tmp_path / "a").read_bytes() == b"1\n2\n"
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
