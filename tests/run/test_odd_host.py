"""A host with extra state in the trainer: compared over ranks, in the checkpoint, put back at a resume."""

from pathlib import Path
from typing import Any

from esper.tolaria.checkpoint.store import CheckpointStore
from tests.support.tiny import act, custom_host, make_engine, replica, schedule, tiny_config

SETTINGS: dict[str, Any] = {
    "host": custom_host("tests.support.odd_hosts:counting", {"r0c0": "2"}),
    "trainer__steps": 24,
    "trainer__batch": 64,
    "control__every": 2,
    "checkpoint__every_ticks": 3,
    "controller": schedule(
        act(1, "r0c0", "GERMINATE", blueprint="mlp", ticks=1), act(3, "r0c0", "ADVANCE"), act(4, "r0c0", "ADVANCE")
    ),
}


def test_extra_state_is_in_the_checkpoint_and_a_resume_is_the_same_run(tmp_path: Path) -> None:
    engine = make_engine(tiny_config("cnn", **SETTINGS), tmp_path)
    engine.begin(None)
    engine.run()
    store = CheckpointStore.of_run(tmp_path)
    assert store.load(12, "state.pt")["model"]["1._extra_state"]["names"] == ["a", None]
    again = make_engine(tiny_config("cnn", **SETTINGS), tmp_path, attempt=2)
    again.begin(12)
    again.run()
    assert replica(again) == replica(engine)
    states = [one.grown.model.state_dict()["1._extra_state"]["calls"] for one in (engine, again)]
    assert states[0] == states[1] > 0
