"""What is compiled ahead: what is foreseen, how it is told, where kernels lie, and a process that nobody depends on."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from esper.accord.lifecycle import SlotState
from esper.accord.state import RunState
from esper.kasmina.kernels.folder import machine_folder, open_folder, private_folder
from esper.leyline.alpha import Operator
from esper.leyline.commands import Command
from esper.leyline.errors import ConfigError
from esper.leyline.observation import BlueprintInfo
from esper.leyline.stages import Op, Stage
from esper.run.kernels import helper as ahead
from esper.run.kernels import standing
from esper.run.kernels.foresee import Foreseen, foresee
from esper.run.kernels.helper import Helper
from esper.run.kernels.process import Inbox, Report, in_order
from esper.run.kernels.wire import describe_batch, make_batch
from esper.tamiyo.heuristic_config import HeuristicConfig
from esper.tamiyo.none import NoneConfig
from esper.tamiyo.random import RandomConfig
from esper.tamiyo.schedule import ScheduleConfig
from tests.support.patience import Patience, cpu_of, wait_until
from tests.support.tiny import act, tiny_plain

A, B = "r0c0", "r1c0"
CPU = torch.device("cpu")


def info(name: str, parameters: int) -> BlueprintInfo:
    return BlueprintInfo(name=name, parameters=parameters, flops=None, reach=None)


CATALOGUE = {A: [info("noop", 0), info("norm", 8), info("conv", 90)], B: [info("noop", 0), info("norm", 16)]}
OPERATORS = dict.fromkeys((A, B), (Operator.ADD, Operator.MULTIPLY))
FIRST = RunState(slots=(SlotState(slot=A), SlotState(slot=B)))


def names(found: list[Foreseen]) -> list[tuple[str, str]]:
    return [(seed.slot, seed.blueprint) for seed in found]


def test_rules_take_blueprints_in_rotation_slot_by_slot() -> None:
    found = foresee(HeuristicConfig(), CATALOGUE, OPERATORS, FIRST)
    assert names(found) == [(A, "conv"), (B, "norm"), (A, "norm")]
    assert {seed.operator for seed in found} == {Operator.ADD}
    preferred = foresee(HeuristicConfig(blueprints=["norm", "conv"]), CATALOGUE, OPERATORS, FIRST)
    assert names(preferred) == [(A, "norm"), (B, "norm"), (A, "conv")]
    both = {A: CATALOGUE[A], B: CATALOGUE[A]}
    spread = foresee(HeuristicConfig(blueprints=["norm", "conv"], spread=True), both, OPERATORS, FIRST)
    assert names(spread) == [(A, "norm"), (B, "conv"), (A, "conv"), (B, "norm")]


def test_the_order_follows_from_the_agreed_record() -> None:
    """A slot's births say how far its rotation has come; empty slots are next, then live seeds, then fossils."""
    both, rules = {A: CATALOGUE[A], B: CATALOGUE[A]}, HeuristicConfig(blueprints=["norm", "conv"])

    def order(first: SlotState, second: SlotState, rules: HeuristicConfig = rules) -> list[tuple[str, str]]:
        return names(foresee(rules, both, OPERATORS, RunState(tick=9, slots=(first, second))))

    once, empty = SlotState(slot=A, generation=1), SlotState(slot=B)
    assert order(once, empty) == [(B, "norm"), (A, "conv"), (B, "conv"), (A, "norm")]
    live = replace(once, stage=Stage.TRAINING, blueprint="norm")
    assert order(live, empty) == [(B, "norm"), (B, "conv"), (A, "conv"), (A, "norm")]
    fossil = replace(empty, stage=Stage.FOSSILIZED, generation=4, blueprint="norm")
    assert order(live, fossil) == [(A, "conv"), (A, "norm"), (B, "norm"), (B, "conv")]
    waits = replace(once, staged=Command(slot=A, op=Op.GERMINATE, blueprint="conv"))
    assert order(waits, empty) == [(B, "norm"), (B, "conv"), (A, "norm"), (A, "conv")]
    spread = replace(rules, spread=True)
    assert order(replace(once, generation=2), replace(empty, generation=2), spread)[:2] == [(A, "norm"), (B, "conv")]
    assert order(once, replace(empty, generation=2), spread)[0] == (A, "conv")


def test_a_schedule_goes_on_where_the_agreed_record_stands() -> None:
    actions = [
        act(1, A, "GERMINATE", blueprint="conv"),
        act(7, A, "SET_ALPHA_TARGET", target=1.0, operator="MULTIPLY"),
        act(9, B, "GERMINATE", blueprint="norm"),
    ]
    seed = SlotState(slot=A, stage=Stage.BLENDING, generation=1, blueprint="conv", operator=Operator.ADD)
    fading = Foreseen(slot=A, blueprint="conv", operator=Operator.MULTIPLY, fades_from=Operator.ADD)
    last = Foreseen(slot=B, blueprint="norm")

    def order(tick: int) -> list[Foreseen]:
        state = RunState(tick=tick, slots=(seed, SlotState(slot=B)))
        return foresee(ScheduleConfig(actions=actions), CATALOGUE, OPERATORS, state)

    assert order(6) == [fading, replace(fading, fades_from=None), last]
    assert (order(7), order(9)) == ([last], [])


def test_the_order_of_the_agreed_record_replaces_that_of_the_start(capfd: pytest.CaptureFixture[str]) -> None:
    inbox, report = Inbox(), Report()
    coming = in_order(["a", "b", "c"], inbox, report)
    assert next(coming) == "a"
    inbox.lines.put(["c", "a"])
    assert list(coming) == ["c", "a"]
    assert capfd.readouterr().out == "", "only what is all compiled is told"
    begun = in_order(["a"], inbox, report)
    assert next(begun) == "a"
    inbox.lines.put(["b"])
    assert list(begun) == ["b"]
    waiting = in_order([], inbox, report)
    inbox.lines.put([])
    assert list(waiting) == []


def test_what_adds_nothing_is_not_prepared() -> None:
    catalogue = {A: [replace(one, folds_into="stem") for one in CATALOGUE[A]], B: CATALOGUE[B]}
    assert names(foresee(HeuristicConfig(), catalogue, OPERATORS, FIRST)) == [(B, "norm")]
    found = foresee(RandomConfig(), catalogue, OPERATORS, FIRST)
    assert {(seed.slot, seed.operator) for seed in found} == {
        (A, Operator.MULTIPLY),
        (B, Operator.ADD),
        (B, Operator.MULTIPLY),
    }


def test_other_controllers_may_take_any_operator_and_nobody_takes_none() -> None:
    found = foresee(RandomConfig(), CATALOGUE, OPERATORS, FIRST)
    assert [seed.operator for seed in found] == [Operator.ADD] * 3 + [Operator.MULTIPLY] * 3
    assert foresee(NoneConfig(), CATALOGUE, OPERATORS, FIRST) == []


def test_a_schedule_says_what_is_born_and_which_operators_fade() -> None:
    actions = [
        act(7, A, "SET_ALPHA_TARGET", target=1.0, operator="MULTIPLY"),
        act(1, A, "GERMINATE", blueprint="conv"),
        act(2, B, "GERMINATE", blueprint="unknown"),
        act(9, A, "SET_ALPHA_TARGET", target=0.5),
        act(20, A, "GERMINATE", blueprint="conv"),
    ]
    assert foresee(ScheduleConfig(actions=actions), CATALOGUE, OPERATORS, FIRST) == [
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
    patience = Patience(cpu_of(lambda: [broken.process.pid]))
    wait_until(lambda: broken.wait(0.0) is not None, "the word of a broken one", patience)
    assert broken.told is not None
    assert "nonsense" in broken.told["why"]
    broken.close()
    assert "the process that compiles ahead had ended" in capfd.readouterr().err
    assert (gone(broken.process.pid), gone(killed.process.pid)) == (True, True)


def niceness(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


def test_a_helper_that_ranks_wait_for_has_their_priority_until_they_go_on(tmp_path: Path) -> None:
    """On a machine with other work it would else get no time, and hold up the start."""
    waited_for, other = (Helper({}, str(tmp_path), awaited=awaited) for awaited in (True, False))
    mine = niceness(0)
    assert waited_for.process.args[-1] == "0"  # type: ignore[index]
    assert niceness(waited_for.process.pid) == mine
    waited_for.step_back()
    assert niceness(waited_for.process.pid) == 19
    asks = [*other.process.args[:-1], "7"]  # type: ignore[index]
    with subprocess.Popen(asks, stdin=subprocess.PIPE, start_new_session=True) as bare:  # without an order it waits
        patience = Patience(cpu_of(lambda: [bare.pid]))
        wait_until(lambda: niceness(bare.pid) == min(mine + 7, 19), "its own priority", patience)
        bare.kill()
    for helper in (waited_for, other):
        helper.close()


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
if sys.argv[2] == "stops":
    os.kill(os.getpid(), signal.SIGSTOP)
signal.pause()
"""


@pytest.mark.parametrize("what", ["stops", "waits"])
def test_a_helper_that_holds_a_lock_and_stands_still_does_not_hold_the_rank(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that compiles would wait for the lock on a kernel, and torch gives up after ten minutes."""
    if what == "waits":
        monkeypatch.setattr(ahead, "_STILL_S", 1.0)
    helper = object.__new__(Helper)
    helper.told, helper._said = None, b""
    helper.process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock"), what],
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


def test_what_computes_gets_on_however_little_and_what_only_waits_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    at, used = [0.0], [5.0]
    monkeypatch.setattr(standing, "time", SimpleNamespace(monotonic=lambda: at[0]))
    monkeypatch.setattr(standing, "cpu_seconds", lambda root: used[0])
    still = standing.Standstill(1, 20.0)
    found = []
    for at[0], used[0] in ((19.0, 5.0), (20.0, 6.1), (39.0, 6.1), (40.0, 6.2), (60.0, 6.2)):
        found.append(still())
    assert found == [False, False, False, True, True]


def test_the_time_of_a_process_is_that_of_all_that_it_has_started() -> None:
    burn = "import time\nwhile time.process_time() < 0.5:\n    pass"
    before = standing.cpu_seconds(os.getpid())
    subprocess.run(["sh", "-c", '"$0" -c "$1"; :', sys.executable, burn], check=True)
    assert standing.cpu_seconds(os.getpid()) - before > 0.4
