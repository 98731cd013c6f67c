"""In a user's own loop a rank that is late is waited for and named; one that is gone ends the run by name."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from esper.leyline.errors import EsperError, LockstepError
from tests.support.dist import Died, run_distributed
from tests.support.patience import load
from tests.support.sessions import batch, host, make, replica, shard, train

PLACES = ["forward", "backward", "save", "alone"]


class Heard:
    """Standard error of a rank; `said` is set once it tells of a wait."""

    def __init__(self, said: Path) -> None:
        self.said = said

    def write(self, text: str) -> int:
        if "has waited" in text:
            self.said.write_text(text)
        return len(text)

    def flush(self) -> None:
        pass


def strike(session: Any, place: str, folder: Path, blow: Any) -> None:
    """Has the third step, or the save after it, call ``blow`` on the way."""
    train(session, range(2))
    layer = session.grown.model[7]
    if place == "forward":
        handle = layer.register_forward_pre_hook(lambda module, args: blow())
    elif place == "backward":
        handle = layer.weight.register_hook(lambda grad: blow())
    if place in ("forward", "backward"):
        train(session, [2])
        handle.remove()
        return
    train(session, [2])
    if place == "alone":
        with torch.no_grad():
            session.model(torch.zeros(1, 1, 6, 6, dtype=torch.float64))
            blow()
    else:
        blow()
    session.save(folder / "x.pt")


def late(rank: int, place: str, folder: Path, limit_s: float) -> dict[str, Any]:
    """Rank 1 comes only when rank 0 has said that it waits, which is after the limit."""
    said = folder / "said"
    sys.stderr = Heard(said)  # type: ignore[assignment]
    session = make(control={"timeout_s": limit_s, "slow_timeout_s": limit_s}, actions=())

    def blow() -> None:
        while rank == 1 and not said.exists():
            time.sleep(0.05)

    strike(session, place, folder, blow)
    train(session, range(3, 5))
    found = replica(session)
    session.close()
    return found


@pytest.mark.parametrize("place", PLACES)
def test_a_rank_that_is_late_is_waited_for_and_named(place: str, tmp_path: Path) -> None:
    mine, theirs = run_distributed(late, 2, place, tmp_path, 1.0 + load() / 2)
    assert mine == theirs
    text = (tmp_path / "said").read_text()
    where = {"forward": "in forward", "backward": "in backward"}.get(place, "in the loop")
    assert "rank 0 has waited" in text
    assert f"for rank 1 ({where} at step {2 if place in ('forward', 'backward') else 3})" in text


def stopped(rank: int, place: str, folder: Path, limit_s: float) -> tuple[str, float]:
    session = make(control={"timeout_s": limit_s, "slow_timeout_s": 600.0}, actions=())
    began = [0.0]

    def blow() -> None:
        if rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        began[0] = time.monotonic()

    try:
        strike(session, place, folder, blow)
        train(session, range(3, 5))
    except LockstepError as error:
        return str(error), (time.monotonic() - began[0]) / limit_s
    return "went on", 0.0


@pytest.mark.parametrize("place", ["forward", "backward", "save"])
def test_a_rank_that_is_stopped_ends_the_run_by_name(place: str, tmp_path: Path) -> None:
    (text, limits), died = run_distributed(stopped, 2, place, tmp_path, 2.0 + load(), may_die=(1,))
    assert isinstance(died, Died)
    assert "rank 1 has not beaten for" in text, text
    assert "(stopped, or cut off), last seen in " in text
    assert limits < 2.5


def stopped_beside_a_gpu(rank: int, limit_s: float) -> tuple[str, float]:
    """Rank 1 is stopped in backward; rank 0 then waits for its device in the user's own code, in no call of ours."""
    session = make(
        host(dtype=torch.float32).cuda(),
        probe=[(x.float().cuda(), y.cuda()) for x, y in (batch(-1 - index) for index in range(8))],
        control={"timeout_s": limit_s, "slow_timeout_s": 600.0},
        actions=(),
    )

    def on_device(number: int) -> Any:
        x, y = shard(batch(number), rank, 2)
        return x.float().cuda(), y.cuda()

    def step(number: int) -> None:
        loss = session.loss(on_device(number))
        loss.backward()
        loss.item()
        session.model[7].weight.grad.sum().item()  # waits for the reduction
        session.step()

    step(0)
    if rank == 1:
        session.model[7].weight.register_hook(lambda grad: os.kill(os.getpid(), signal.SIGSTOP))
    began = time.monotonic()
    try:
        for number in range(1, 4):
            step(number)
    except LockstepError as error:
        return str(error), (time.monotonic() - began) / limit_s
    return "went on", 0.0


def late_for_good(rank: int, folder: Path, limit_s: float) -> str:
    """Rank 1 beats and does not come. The watchdog that a session on GPUs has is on; gloo alone would wait for long."""
    session = make(actions=())
    if rank == 0:
        session._loop.marks.watch_device(lambda: limit_s, session._loop.world.wait)
    ended = folder / "ended"

    def blow() -> None:
        while rank == 1 and not ended.exists():
            time.sleep(0.05)

    try:
        strike(session, "backward", folder, blow)
    except LockstepError as error:
        ended.touch()
        return str(error)
    return "went on"


def test_the_watchdog_of_a_session_on_gpus_ends_a_wait_for_a_rank_that_beats(tmp_path: Path) -> None:
    limit_s = 1.0 + load() / 2
    mine, theirs = run_distributed(late_for_good, 2, tmp_path, limit_s)
    where = f"lost contact in backward: waited {limit_s:.0f} s in backward: rank 1 did not come"
    assert mine.startswith(f"{where}, while rank 0 waited in backward at step 2")
    assert "rank 1 did not come" in theirs


@pytest.mark.gpu
def test_a_rank_that_is_stopped_ends_a_wait_for_the_device_by_name() -> None:
    """What two GPUs have to show: the thread of the beats wakes a main thread in a device sync, which names rank 1."""
    (text, limits), died = run_distributed(stopped_beside_a_gpu, 2, 4.0, may_die=(1,), device="gpu")
    assert isinstance(died, Died)
    assert "rank 1 has not beaten for" in text, text
    assert limits < 2.5


def saving_alone(rank: int, folder: Path, limit_s: float) -> str:
    session = make(control={"timeout_s": limit_s, "slow_timeout_s": 600.0}, actions=())
    train(session, range(3))
    try:
        if rank == 0:
            session.save(folder / "x.pt")
        train(session, range(3, 5))
    except EsperError as error:
        return str(error)
    return "went on"


def test_a_save_on_rank_0_alone_says_so(tmp_path: Path) -> None:
    for text in run_distributed(saving_alone, 2, tmp_path, 1.0 + load() / 2):
        assert "every rank must call session.save" in text


# start-up -----------------------------------------------------------------------------------------------------------


def late_to_start(rank: int, folder: Path) -> str:
    """In a program with a process group of its own rank 1 comes late: after the limit of a tick, or never."""
    dist.init_process_group("gloo", rank=rank, world_size=2)
    control = {"timeout_s": 1.0, "slow_timeout_s": 1.0, "startup_timeout_s": 300.0}
    if rank == 1:
        time.sleep(4.0)
    session = make(control=control, actions=())
    train(session, range(3))
    session.close()
    return "came through"


def never_there(rank: int, folder: Path) -> str:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    done = folder / "done"
    if rank == 1:
        while not done.exists():
            time.sleep(0.05)
        return ""
    try:
        make(control={"timeout_s": 600.0, "slow_timeout_s": 600.0, "startup_timeout_s": 1.0})
    except LockstepError as error:
        return str(error)
    finally:
        done.touch()
    return "went on"


def test_start_up_has_its_own_limit_in_a_program_with_its_own_group(tmp_path: Path) -> None:
    assert run_distributed(late_to_start, 2, tmp_path) == ["came through"] * 2
    text, _ = run_distributed(never_there, 2, tmp_path)
    assert text.startswith("lost contact in start-up: rank 1 never arrived"), text


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    session = make(actions=())
    session.close()
    assert threading.active_count() == before
