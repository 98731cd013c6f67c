"""A stop that somebody asks for in wandb's page is the run's own agreed stop: all ranks save, and it can go on."""

import json

import pytest

from tests.e2e.conftest import Start
from tests.support.commands import ESPER, LENGTH, TRAIN
from tests.support.wandb_server import wandb_server


@pytest.mark.slow
def test_a_stop_asked_in_wandb_is_agreed_on_by_all_ranks(start: Start, tmp_path) -> None:
    with wandb_server() as server:
        server.stop.set()
        settings = ("experiment=demo", "seed=1", *LENGTH, "telemetry.wandb.mode=online", "run.dir=run")
        settings += ("telemetry.wandb.artifacts=none",)
        run = start(TRAIN, *settings, **server.variables)
        assert run.end() == 75, run.told()
    status = json.loads((tmp_path / "run" / "STATUS.json").read_text())
    assert status["status"] == "preempted"
    assert status["message"].endswith("a checkpoint is written, as was asked for in wandb")
    assert 0 < status["step"] < 240
    names = [q["variables"].get("displayName") for q in server.queries if "UpsertBucket" in q.get("query", "")]
    assert names[0] == "demo, heuristic, seed 1"
    again = start(ESPER, "resume", "run", "telemetry.wandb.mode=disabled")
    assert again.end() == 0, again.told()
