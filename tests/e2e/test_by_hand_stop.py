"""A torchrun typed by hand that is stopped as a terminal, Slurm or a person stops it saves what it has."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Start
from tests.support.commands import NO_WANDB, TRAIN, Command, assert_gone, free_port, mark

# A tick takes a second or more, as in a real run, so that the repeats of a signal arrive before it.
LONG = ("trainer.epochs=2000", "control.every=400", "control.max_steps=400", "checkpoint.every_ticks=1000")


def everybody(command: Command) -> list[int]:
    return [*command.below(), command.process.pid]


def agent_alone(command: Command) -> list[int]:
    return [command.process.pid]


@pytest.mark.parametrize(
    ("number", "whom"),
    [
        (signal.SIGTERM, everybody),
        (signal.SIGINT, everybody),
        (signal.SIGUSR1, everybody),
        (signal.SIGTERM, agent_alone),
    ],
)
def test_it_saves(start: Start, tmp_path: Path, number: int, whom: Callable[[Command], list[int]]) -> None:
    run = tmp_path / "run"
    prepared = start(TRAIN, "experiment=demo", *LONG, NO_WANDB, "telemetry=off", "launch=prepare", "run.dir=run")
    assert prepared.end() == 0, prepared.told()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    typed = start(torchrun, "-m", "esper.worker", str(run / "config.yaml"))
    typed.until(lambda: mark(run).step > 5, "the first steps")
    for pid in whom(typed):
        os.kill(pid, number)
    typed.end()
    assert_gone(typed, run)
    status = json.loads((run / "STATUS.json").read_text())
    assert status["status"] == "preempted", typed.told()
    assert (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()
