"""The watchdog speaks once, only in phases that wait for peers, and only when a mark has stood too long."""

import threading
import time
from functools import partial
from pathlib import Path

from esper.tolaria.ranks.heartbeat import Heartbeat
from esper.tolaria.ranks.watchdog import WAITING, Watchdog, phase_that_waits
from tests.support.patience import load


def told(tmp_path: Path, phase: str, *, limit_s: float, wait_s: float, remark: bool = False) -> list[str]:
    """What the watchdog says; both times are those of a quiet machine."""
    slowness = load()
    beat, other = Heartbeat(tmp_path, 0, 2), Heartbeat(tmp_path, 1, 2)
    other.step, other.tick = 7, 1
    other.mark("forward")
    beat.step, beat.tick = 8, 1
    beat.mark(phase)
    said: list[str] = []
    spoken = threading.Event()

    def on_stuck(text: str) -> None:
        said.append(text)
        spoken.set()

    wait = partial(phase_that_waits, beat)
    dog = Watchdog(wait, beat.explain, lambda: limit_s * slowness, on_stuck, poll_s=0.02)
    until = time.monotonic() + wait_s * slowness
    while time.monotonic() < until and not spoken.wait(0.05):
        if remark:
            beat.mark(phase)
    dog.close()
    dog.close()
    beat.close()
    other.close()
    return said


def test_a_rank_stuck_in_a_waiting_phase_is_told_who_is_missing(tmp_path: Path) -> None:
    (text,) = told(tmp_path, "step", limit_s=0.1, wait_s=10)
    assert "in step" in text
    assert "rank 1 was last seen in forward at step 7" in text


def test_a_phase_that_does_not_wait_for_peers_may_take_its_time(tmp_path: Path) -> None:
    assert "save" not in WAITING
    assert told(tmp_path, "save", limit_s=0.05, wait_s=0.5) == []


def test_progress_keeps_it_silent(tmp_path: Path) -> None:
    assert told(tmp_path, "forward", limit_s=0.4, wait_s=1.2, remark=True) == []
