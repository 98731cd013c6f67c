"""An error is a lost rank only if it came out of a transport; a text that sounds like one is the user's own error."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from esper.leyline.errors import LockstepError
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World
from tests.support.commands import TRAIN, Command
from tests.support.dist import run_distributed

OWN = (
    "skip connection does not fit",
    "the key is not in the feature store",
    "peer pressure: gloo, nccl and a broken pipe timed out",
    "process group of sockets; rendezvous timeout",
)


def say_own_errors(rank: int) -> list[str]:
    """Raises each text within a collective's block on every rank; returns what came out."""
    world, texts = World(WorldConfig(), ControlConfig(timeout_s=5.0)), []
    for text in OWN:
        try:
            with world.collective("forward"):
                raise RuntimeError(text)
        except Exception as error:
            texts.append(f"{type(error).__name__}: {error}")
    world.close()
    return texts


def test_words_of_a_transport_in_a_users_error_change_nothing() -> None:
    assert run_distributed(say_own_errors, 2) == [[f"RuntimeError: {text}" for text in OWN]] * 2


def lose_a_rank(rank: int, group: str, still: bool) -> str:
    """Rank 1 leaves, or stands still; returns what rank 0 raises in its next collective."""
    world = World(WorldConfig(), ControlConfig(timeout_s=2.0, startup_timeout_s=2.0))
    world.all_reduce(torch.zeros(1), dist.ReduceOp.SUM, what="first", on=group)
    if rank == 1:
        if still:
            while True:
                os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(3)
    with pytest.raises(LockstepError) as caught:
        world.all_reduce(torch.zeros(1), dist.ReduceOp.SUM, what="second", on=group)
    assert caught.value.__cause__ is not None, "the transport's own error goes along"
    return str(caught.value)


@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("group", ["control", "data", "default"])
def test_a_transports_own_errors_are_a_lost_rank(group: str, still: bool) -> None:
    text = run_distributed(lose_a_rank, 2, group, still, may_die=[1])[0]
    assert text.startswith("lost contact in second: ")


def test_a_users_error_on_every_rank_ends_the_run_with_its_traceback(tmp_path: Path) -> None:
    host = ("host=custom", "host.path=tests.support.failing_host:build", f"host.options={{text: {OWN[0]}}}")
    run = Command(
        TRAIN,
        "experiment=demo",
        "controller=none",
        *host,
        "host.sites={r0c0: stem}",
        "telemetry=off",
        "run.dir=run",
        folder=tmp_path,
    )
    try:
        assert run.end() == 70, run.told()
    finally:
        run.clear()
    assert run.err.count("failing_host.py") == 2, "the place of the error, from each rank"
    assert ": RuntimeError: skip connection does not fit (run directory: " in run.err.splitlines()[-1]
    assert json.loads((tmp_path / "run" / "STATUS.json").read_text())["exit_code"] == 70
