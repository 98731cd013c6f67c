"""A main thread that no cut connection wakes does not hold its process: it ends with the named outcome."""

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from esper.leyline.errors import LockstepError
from esper.tolaria.ranks import beats
from esper.tolaria.ranks.lastword import LastWord
from tests.support.dist import rank_context
from tests.support.patience import load


def hang() -> None:
    """As the abort of a device's group may."""
    threading.Event().wait()


def fail() -> None:
    raise RuntimeError("NCCL error: unhandled system error")


def cut_in_vain() -> None:
    pass


def wait_for_a_device(cut: Callable[[], None], watched: bool, out: Path) -> None:
    """Waits, as rank 0 of 2, in what nothing ends. Rank 1 never beats; or it does, and never comes."""
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 2)
    beats.TORN_S = 0.3
    store = dist.TCPStore("localhost", 0, is_master=True)
    marks = LastWord(store, 0, 2)
    wait, limit_s = ("backward", time.monotonic()), 0.5 * load()
    marks.begin_beats(1e6 if watched else limit_s, lambda: wait, cut)
    if watched:
        marks.watch_device(lambda: limit_s, lambda: wait)
    hang()


@pytest.mark.parametrize(("cut", "watched"), [(hang, False), (fail, False), (cut_in_vain, False), (hang, True)])
def test_a_wait_that_cannot_be_ended_ends_the_process(cut: Callable[[], None], watched: bool, tmp_path: Path) -> None:
    process = rank_context().Process(target=wait_for_a_device, args=(cut, watched, tmp_path / "err"))
    process.start()
    process.join()
    said = (tmp_path / "err").read_text()
    assert process.exitcode == LockstepError.exit_code, said
    word = "in backward: rank 1 did not come" if watched else "rank 1 has not beaten for"
    assert any(line.startswith("esper: ") and word in line for line in said.splitlines()), said


@pytest.mark.parametrize("waits", [True, False])
def test_a_wait_that_has_ended_ends_nothing_more(waits: bool, tmp_path: Path) -> None:
    """Rank 1 is gone when this rank's wait has just ended, or while it computes: it goes on to where it meets that."""
    process = rank_context().Process(target=go_on_after_a_loss, args=(waits, tmp_path / "err"))
    process.start()
    process.join()
    assert process.exitcode == 0, (tmp_path / "err").read_text()


def go_on_after_a_loss(waits: bool, out: Path) -> None:
    os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 2)
    beats.TORN_S = 0.3
    store = dist.TCPStore("localhost", 0, is_master=True)
    cut = threading.Event()
    now = beats.Place(5, "forward")
    beating = beats.Beats(store, 0, 2, limit_s=1e6, place=lambda: now, on_lost=lambda text: cut.set())
    beating.end("rank 1 is gone", beats.Place(5, "forward", "backward", 1.0) if waits else None)
    assert cut.is_set()
    beating.close()
