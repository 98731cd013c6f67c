"""A torchrun typed by hand that is stopped as a terminal, Slurm or a person stops it saves what it has."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from esper.config.tree import write_config
from tests.e2e.conftest import Start
from tests.support.commands import Command, assert_gone, free_port, mark
from tests.support.tiny import tiny_plain

# A tick takes a second or more, as in a real run, so that the repeats of a signal arrive before it.
LONG = {"trainer__steps": 100_000, "trainer__batch": 32, "control__every": 200, "control__max_steps": 200}


def everybody(command: Command) -> list[int]:
    return [*command.below(), command.process.pid]


def agent_alone(command: Command) -> list[int]:
    return [command.process.pid]


@pytest.mark.parametrize(
    ("number", "whom", "ranks"),
    [
        pytest.param(signal.SIGTERM, everybody, 2, marks=pytest.mark.slow),  # both SIGTERMs: test_by_hand.py, too
        (signal.SIGINT, everybody, 1),
        pytest.param(signal.SIGUSR1, everybody, 1, marks=pytest.mark.slow),  # to a rank: tests/dist/test_recovery.py
        pytest.param(signal.SIGTERM, agent_alone, 2, marks=pytest.mark.slow),
    ],
)
def test_it_saves(start: Start, tmp_path: Path, number: int, whom: Callable[[Command], list[int]], ranks: int) -> None:
    run = tmp_path / "run"
    run.mkdir()
    write_config(run / "config.yaml", tiny_plain("cnn", **LONG, world__nproc_per_node=ranks, run__dir=str(run)))
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    typed = start([*torchrun, f"--master-port={free_port()}"], "-m", "esper.worker", str(run / "config.yaml"))
    typed.until(lambda: mark(run).step > 5, "the first steps")
    for pid in whom(typed):
        os.kill(pid, number)
    typed.end()
    assert_gone(typed, run)
    status = json.loads((run / "STATUS.json").read_text())
    assert status["status"] == "preempted", typed.told()
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()
