"""A session file of somebody else names a controller: its code runs only when the caller names it, too."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import esper
from esper.leyline.errors import ConfigError
from tests.support.foreign import STRANGER, Trap, give_away, lay_trap, needs_root
from tests.support.sessions import host, loss, make, probe, train

IDLE = {"kind": "custom", "path": "trap_code:Idle", "options": None}


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trap:
    monkeypatch.syspath_prepend(tmp_path)
    yield lay_trap(tmp_path)
    sys.modules.pop("trap_code", None)


@pytest.fixture
def path(trap: Trap) -> Path:
    """A file that one's own session wrote, with code that has not been imported since."""
    session = make(controller=IDLE)
    train(session, range(3))
    session.save(trap.folder / "s.pt")
    session.close()
    assert trap.sprung() == ["imported", "called"]
    del sys.modules["trap_code"]
    return trap.folder / "s.pt"


def restore(path: Path, **more: Any) -> esper.Session:
    return esper.Session.restore(path, host, loss=loss, probe=probe(), **more)


def test_ones_own_file_needs_no_word(trap: Trap, path: Path) -> None:
    assert restore(path).steps == 3
    assert trap.sprung() == ["imported", "called"]


def strangers(path: Path) -> None:
    give_away(path)


def groups(path: Path) -> None:
    path.chmod(0o664)


def everyones(path: Path) -> None:
    path.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("hand_over", "whose"),
    [
        pytest.param(strangers, rf"s\.pt: belongs to user {STRANGER}, not to you \(", marks=needs_root),
        (groups, r"s\.pt: may be written by its group"),
        (everyones, r"s\.pt: may be replaced by anyone, as its folder /.* is open to all"),
    ],
)
def test_code_that_a_foreign_file_names_is_not_even_imported(hand_over, whose, trap: Trap, path: Path) -> None:
    hand_over(path)
    with pytest.raises(ConfigError) as caught:
        restore(path)
    (line,) = str(caught.value).splitlines()
    assert re.search(whose, line), line
    assert line.endswith(
        "names code that would be imported and run here: controller.path = 'trap_code:Idle'; "
        f"if you trust it, pass controller={IDLE!r} to restore"
    )
    assert trap.sprung() == []
    assert "trap_code" not in sys.modules
    session = restore(path, controller=IDLE)  # what the line says
    assert session.steps == 3
    assert trap.sprung() == ["imported", "called"]
    train(session, range(3, 6))


@needs_root
def test_a_built_in_controller_needs_no_word(tmp_path: Path) -> None:
    session = make()
    session.save(tmp_path / "s.pt")
    give_away(tmp_path / "s.pt")
    assert restore(tmp_path / "s.pt").steps == 0


def test_no_umask_lets_others_write_a_session_file(tmp_path: Path) -> None:
    session = make()
    for mask, mode in ((0, 0o644), (0o002, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            session.save(tmp_path / f"{mask}.pt")
        finally:
            os.umask(before)
        assert (tmp_path / f"{mask}.pt").stat().st_mode & 0o777 == mode
