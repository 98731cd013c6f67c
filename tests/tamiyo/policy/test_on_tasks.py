"""The policy of this package drives runs of every shipped task, and of one of a user's own."""

from pathlib import Path

import pytest

from tests.support.tiny import make_engine
from tests.support.toy_tasks import TOYS, toy_config

POLICY = {"kind": "policy", "checkpoint": None, "mode": "greedy"}


@pytest.mark.parametrize("name", TOYS)
def test_it_drives(name: str, tmp_path: Path) -> None:
    engine = make_engine(toy_config(name, controller=POLICY, trainer__steps=12, control__every=2), tmp_path)
    engine.begin(None)
    result = engine.run()
    engine.saver.close()
    assert result.tick == 6
    assert engine.controller is not None
    assert engine.controller.name == "policy"
    assert any(record for record in engine.controller.state_dict()["core"]), "it has seen the ticks"
