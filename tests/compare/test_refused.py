"""Guards of comparisons that no other test makes fire."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.compare.arms import CompareConfig, derive, load_compare
from esper.compare.growth import GrowthArm, build_arm
from esper.compare.lengths import DataCache
from esper.compare.runner import ArmJob, Comparer, Stopped, _start
from esper.compare.search import trials_of
from esper.leyline.errors import ConfigError, EsperError
from esper.simic.env.tasks import find_task
from tests.compare.test_runner import ALONE
from tests.compare.test_trained import PLANTED
from tests.support.patience import Patience, wait_until
from tests.support.refusals import fails


def read(folder: Path, text: str, *changes: str) -> CompareConfig:
    """A comparison of one's own."""
    (folder / "mine.yaml").write_text(text)
    return load_compare(str(folder / "mine.yaml"), list(changes))


def with_base(override: str) -> None:
    compare = load_compare("digits_cpu", [])
    compare.base.append(override)
    derive(compare, "none", 100, {}, DataCache())


def wait(folder: Path) -> None:
    comparer = Comparer(read(folder, ALONE.format(root=folder)), folder / "out", print)
    comparer._wait(lambda: _start([str(folder / "none")], folder / "log", {}))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda tmp: with_base("optim.lr=???"), ConfigError, r"^optim\.lr = \?\?\?: missing; set optim\.lr=<value>$"),
        (lambda tmp: with_base("host.nothing=1"), ConfigError, r"^compare: arm none: .*nothing"),
        (
            lambda tmp: build_arm(GrowthArm(controller={"kind": "heuristic", "life_ticks": "x"}), find_task("hd1")),
            ConfigError,
            r"^compare\.arms\.controller\.life_ticks = 'x'",
        ),
        (
            lambda tmp: trials_of(read(tmp, PLANTED, "arms.replay.flops=scratch", "arms.scratch.search=true"), [0.1]),
            EsperError,
            r"^compare: arm replay searches and waits for scratch, which searches too$",
        ),
        (wait, EsperError, r"^a run cannot be started: .*No such file or directory"),
    ],
)
def test_comparisons(call: Callable[[Path], Any], kind: type[Exception], text: str, tmp_path: Path) -> None:
    fails(lambda: call(tmp_path), kind, text)


def test_once_it_is_stopped_no_job_begins(tmp_path: Path) -> None:
    comparer = Comparer(load_compare("digits_cpu", []), tmp_path / "out", print)
    comparer.stop()
    for arm in ("none", "none_long"):  # the second one waits for another arm
        with pytest.raises(Stopped):
            comparer.run(ArmJob(arm, 1))
    assert not (tmp_path / "out").exists()


def run_as(program: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Comparer:
    """A comparison of runs of two ranks, where this program runs in place of Python."""
    (folder / "program").write_text(f"#!/bin/sh\n{program}\n")
    (folder / "program").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(folder / "program"))
    compare = load_compare("digits_cpu", [])
    compare.base.append("world.nproc_per_node=2")
    return Comparer(compare, folder / "out", print)


def test_a_run_that_fails_is_told_by_its_last_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparer = run_as("echo first; echo no memory; exit 70", tmp_path, monkeypatch)
    fails(
        lambda: comparer.run(ArmJob("none", 1)),
        EsperError,
        r"^no memory \(its output: .*/out/runs/[0-9a-f]{16}/console\.log\)$",
    )


def test_a_run_that_was_stopped_has_not_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparer = run_as("exec sleep 60", tmp_path, monkeypatch)

    def stop() -> None:
        wait_until(lambda: bool(comparer._children), "the run", Patience(lambda: 0))
        comparer.stop()

    stopping = threading.Thread(target=stop)
    stopping.start()
    with pytest.raises(Stopped):
        comparer.run(ArmJob("none", 1))
    stopping.join()
