"""A window of steps is profiled once, on rank 0, and the run is the same run."""

import json
from pathlib import Path

from esper.run.telling.profiler import ProfileWindow
from tests.support.tiny import make_engine, replica, tiny_config


def test_a_window_of_steps_leaves_a_trace_and_a_table(tmp_path: Path, capsys) -> None:
    config = tiny_config(trainer__steps=8)
    plain = make_engine(config, tmp_path)
    plain.begin(None)
    plain.run()
    profiled = make_engine(config, tmp_path)
    profiled.cycle.observers.add(ProfileWindow(profiled.heartbeat, tmp_path, 3, 2))
    profiled.begin(None)
    profiled.run()
    assert replica(profiled) == replica(plain)
    trace = json.loads((tmp_path / "profile-00000003.json").read_text())
    names = [event.get("name", "") for event in trace["traceEvents"]]
    assert sum(name == "Optimizer.step#AdamW.step" for name in names) == 2, "two steps"
    assert "aten::" in (tmp_path / "profile-00000003.txt").read_text()
    assert "profile of steps 3 to 5" in capsys.readouterr().out
