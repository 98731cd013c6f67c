"""Waiting itself: what gets on is waited for, what stands still fails with its story and is ended."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import patience
from tests.support.commands import alive
from tests.support.patience import Patience, cpu_of, marks_of, run_patiently, size_of, wait_until

SPIN = "while True: pass"
SLEEP = "import time; time.sleep(600)"


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine counts as a quiet one, and CPU time is looked at often."""
    monkeypatch.setattr(patience, "load", lambda: 1.0)
    monkeypatch.setattr(patience, "SAMPLE_S", 0.02)


def test_a_sign_that_moves_renews_it_and_one_that_stands_ends_it() -> None:
    steps = [0]
    waiting = Patience(lambda: steps[0], lambda: "still", still_s=0.2)
    for _ in range(6):
        time.sleep(0.05)
        steps[0] += 1
        assert waiting.lasts()
    time.sleep(0.3)
    assert not waiting.lasts()
    assert "no progress for 0 s (0 s allowed on a quiet machine" in str(waiting)
    assert str(waiting).endswith("its signs stand at [6, 'still']")


def test_a_busy_machine_is_given_more(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Patience(still_s=0.1)
    time.sleep(0.2)
    monkeypatch.setattr(patience, "load", lambda: 100.0)
    assert waiting.lasts()


@pytest.mark.parametrize(("program", "moves"), [(SPIN, True), (SLEEP, False)])
def test_cpu_time_is_a_sign_of_who_computes(program: str, moves: bool) -> None:
    process = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{program}"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # start-up computes in both
        time.sleep(0.1)
        sign = cpu_of(lambda: [process.pid])
        before, until = sign(), time.monotonic() + 2.0
        while sign() == before and time.monotonic() < until:
            time.sleep(0.05)
        assert (sign() != before) is moves
    finally:
        process.kill()
        process.communicate()


def test_output_and_marks_are_signs(tmp_path: Path) -> None:
    signs: list[Callable[[], object]] = [size_of(tmp_path / "out"), marks_of(tmp_path)]
    before = [sign() for sign in signs]
    (tmp_path / "out").write_text("a word")
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat" / "rank-00000").write_text("here")
    assert all(sign() != value for sign, value in zip(signs, before, strict=True))


def test_what_never_comes_fails_with_what_was_waited_for() -> None:
    with pytest.raises(AssertionError, match="the moon did not come: no progress for"):
        wait_until(lambda: False, "the moon", Patience(still_s=0.1))


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    script = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); "
    script += f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid)); print('began', flush=True); child.wait()"
    with pytest.raises(AssertionError, match=r"no progress for[\s\S]*began"):
        run_patiently([sys.executable, "-c", script], still_s=2.0)
    child = int((tmp_path / "pid").read_text())
    wait_until(lambda: not alive(child), "the child's end", Patience(still_s=5.0))


def test_a_command_that_ends_gives_code_and_words() -> None:
    done = run_patiently([sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
