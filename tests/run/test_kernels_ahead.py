"""What is compiled ahead: what is foreseen, how it is told, where kernels lie, and a process that nobody depends on."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.kasmina.kernels.folder import machine_folder, open_folder, private_folder
from esper.leyline.alpha import Operator
from esper.leyline.errors import ConfigError
from esper.leyline.observation import BlueprintInfo
from esper.run.kernels.foresee import Foreseen, foresee
from esper.run.kernels.helper import Helper
from esper.run.kernels.wire import describe_batch, make_batch
from esper.tamiyo.heuristic_config import HeuristicConfig
from esper.tamiyo.none import NoneConfig
from esper.tamiyo.random import RandomConfig
from esper.tamiyo.schedule import ScheduleConfig
from tests.support.tiny import act, tiny_plain

A, B = "r0c0", "r1c0"
CPU = torch.device("cpu")


def info(name: str, parameters: int) -> BlueprintInfo:
    return BlueprintInfo(name=name, parameters=parameters, flops=None, reach=None)


CATALOGUE = {A: [info("noop", 0), info("norm", 8), info("conv", 90)], B: [info("noop", 0), info("norm", 16)]}
OPERATORS = dict.fromkeys((A, B), (Operator.ADD, Operator.MULTIPLY))


def names(found: list[Foreseen]) -> list[tuple[str, str]]:
    return [(seed.slot, seed.blueprint) for seed in found]


def test_rules_take_blueprints_in_rotation_slot_by_slot() -> None:
    found = foresee(HeuristicConfig(), CATALOGUE, OPERATORS)
    assert names(found) == [(A, "conv"), (B, "norm"), (A, "norm")]
    assert {seed.operator for seed in found} == {Operator.ADD}
    preferred = foresee(HeuristicConfig(blueprints=["norm", "conv"]), CATALOGUE, OPERATORS)
    assert names(preferred) == [(A, "norm"), (B, "norm"), (A, "conv")]
    both = {A: CATALOGUE[A], B: CATALOGUE[A]}
    spread = foresee(HeuristicConfig(blueprints=["norm", "conv"], spread=True), both, OPERATORS)
    assert names(spread) == [(A, "norm"), (B, "conv"), (A, "conv"), (B, "norm")]


def test_what_adds_nothing_is_not_prepared() -> None:
    catalogue = {A: [replace(one, folds_into="stem") for one in CATALOGUE[A]], B: CATALOGUE[B]}
    assert names(foresee(HeuristicConfig(), catalogue, OPERATORS)) == [(B, "norm")]
    found = foresee(RandomConfig(), catalogue, OPERATORS)
    assert {(seed.slot, seed.operator) for seed in found} == {
        (A, Operator.MULTIPLY),
        (B, Operator.ADD),
        (B, Operator.MULTIPLY),
    }


def test_other_controllers_may_take_any_operator_and_nobody_takes_none() -> None:
    found = foresee(RandomConfig(), CATALOGUE, OPERATORS)
    assert [seed.operator for seed in found] == [Operator.ADD] * 3 + [Operator.MULTIPLY] * 3
    assert foresee(NoneConfig(), CATALOGUE, OPERATORS) == []


def test_a_schedule_says_what_is_born_and_which_operators_fade() -> None:
    actions = [
        act(7, A, "SET_ALPHA_TARGET", target=1.0, operator="MULTIPLY"),
        act(1, A, "GERMINATE", blueprint="conv"),
        act(2, B, "GERMINATE", blueprint="unknown"),
        act(9, A, "SET_ALPHA_TARGET", target=0.5),
        act(20, A, "GERMINATE", blueprint="conv"),
    ]
    assert foresee(ScheduleConfig(actions=actions), CATALOGUE, OPERATORS) == [
        Foreseen(slot=A, blueprint="conv"),
        Foreseen(slot=A, blueprint="conv", operator=Operator.MULTIPLY, fades_from=Operator.ADD),
        Foreseen(slot=A, blueprint="conv", operator=Operator.MULTIPLY),
    ]


def test_a_batch_is_told_by_its_shape_alone_and_made_of_zeros() -> None:
    image = torch.randn(2, 1, 8, 8)  # channels-last and contiguous at once: only its strides tell
    batch = {
        "image": image,
        "more": [(torch.arange(2), None), torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)],
    }
    made = make_batch(describe_batch(batch), CPU)
    assert made["image"].stride() == image.stride() == (64, 64, 8, 1)
    assert made["more"][0][0].dtype is torch.int64
    assert made["more"][0][1] is None
    assert made["more"][1].is_contiguous(memory_format=torch.channels_last)
    assert not any(tensor.any() for tensor in (made["image"], made["more"][0][0], made["more"][1]))
    with pytest.raises(ValueError, match="object in it"):
        describe_batch([object()])


def test_kernels_are_read_only_where_nobody_else_may_write(tmp_path: Path) -> None:
    new = open_folder(tmp_path / "of" / "mine")
    assert new.stat().st_mode & 0o777 == 0o700
    new.chmod(0o750)
    with pytest.raises(ConfigError, match=r"is open to others \(mode 0750\); chmod 0700"):
        open_folder(new)
    new.chmod(0o700)
    new.parent.chmod(0o777)
    with pytest.raises(ConfigError, match="others may replace what lies in"):
        open_folder(new)
    new.parent.chmod(0o1777)
    assert open_folder(new) == new
    folder, why = private_folder(str(new), CPU, [3, 10])
    assert (folder.parent, why) == (new, "")
    new.chmod(0o777)
    other, why = private_folder(str(new), CPU, [3, 10])
    assert new not in other.parents
    assert why.startswith("kernels are not kept: compile.cache = ")
    assert other.stat().st_mode & 0o777 == 0o700
    other.rmdir()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_somebody_else_is_not_read(tmp_path: Path) -> None:
    theirs = open_folder(tmp_path / "theirs")
    os.chown(theirs, 12345, 12345)
    with pytest.raises(ConfigError, match="belongs to user 12345, not to you"):
        open_folder(theirs)


def test_other_sizes_of_batches_have_kernels_of_their_own() -> None:
    assert machine_folder(CPU, [3, 10]) == machine_folder(CPU, [3, 10]) != machine_folder(CPU, [10, 3])


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_helper_that_cannot_work_says_why_and_one_that_is_killed_keeps_nobody_waiting(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    order: dict[str, Any] = {"config": tiny_plain(), "device": "nonsense"}
    broken = Helper(order, str(tmp_path))
    killed = Helper(order, str(tmp_path))
    os.kill(killed.process.pid, signal.SIGKILL)
    assert killed.wait(60.0) is None
    killed.close()
    told = broken.wait(120.0)
    assert told is not None
    assert "nonsense" in told["why"]
    broken.close()
    assert "the process that compiles ahead had ended" in capfd.readouterr().err
    assert (gone(broken.process.pid), gone(killed.process.pid)) == (True, True)


@pytest.mark.slow
def test_a_helper_ends_with_the_rank_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from esper.run.kernels.helper import Helper\n"
        "print(Helper({}, sys.argv[1]).process.pid, flush=True); time.sleep(600)"
    )
    rank = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert rank.stdout is not None
    pid = int(rank.stdout.readline())
    rank.kill()
    rank.wait()
    while not gone(pid):
        time.sleep(0.05)


HOLDER = """
import fcntl, os, signal, sys
held = open(sys.argv[1], "w")
fcntl.flock(held, fcntl.LOCK_EX)
print("holds", flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
signal.pause()
"""


def test_a_stopped_helper_that_holds_a_lock_does_not_hold_the_rank(tmp_path: Path) -> None:
    """A rank that compiles would wait for the lock on a kernel as long as the helper stands still."""
    helper = object.__new__(Helper)
    helper.told, helper._said = None, b""
    helper.process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert helper.process.stdout is not None
    assert helper.process.stdout.readline() == b"holds\n"
    with (tmp_path / "lock").open("w") as lock:
        with pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with helper.watched():
            fcntl.flock(lock, fcntl.LOCK_EX)  # for ever, but for the watch
    helper.close()
    assert helper.process.returncode == -signal.SIGKILL
