"""A sweep: each job its own torchrun and folder, a failure does not end it, and its sweeper gets the objectives."""

import json
from pathlib import Path

from esper.config.tree import load_config
from tests.e2e.conftest import Start
from tests.support.commands import NO_WANDB, TRAIN

SMALL = ("trainer.steps=60", "control.every=10", "seed=1", NO_WANDB)


def test_a_sweep_goes_on_after_a_failed_job_and_ends_with_the_gravest_code(start: Start, tmp_path: Path) -> None:
    """Two controllers, one of which fails at run time, by two batches, one of which is too small: 76, 78, 0, 78."""
    groups = tmp_path / "conf" / "controller"
    groups.mkdir(parents=True)
    (groups / "failing.yaml").write_text("kind: custom\npath: tests.support.user_controllers:Failing\noptions: {}\n")
    returned = tmp_path / "returned"
    sweep = start(
        TRAIN,
        "-m",
        *SMALL,
        "controller=failing,random",
        "trainer.batch=64,1",
        "hydra.sweep.dir=sweep",
        f"hydra.searchpath=[file://{tmp_path}/conf]",
        "+hydra.callbacks.kept._target_=tests.support.user_controllers.Objectives",
        f"+hydra.callbacks.kept.path={returned}",
    )
    assert sweep.end() == 76, sweep.told()
    assert sweep.err.count("Traceback") == 1, "the place of the controller's own bug, once, on the rank that met it"
    assert "tests/support/user_controllers.py" in sweep.err
    lines = [line for line in sweep.err.splitlines() if line.startswith("esper: ")]
    assert "no luck today" in lines[0], lines
    failed = [line for line in lines if line.startswith("esper: failed at step 30: ")]
    assert len(failed) == 1, lines
    assert f"esper resume {tmp_path}/sweep/0" in failed[0]
    assert [line.split(":")[1:3] for line in lines].count([" config", " trainer.batch = 1"]) == 2
    assert lines[-1] == "esper: 3 of 4 jobs did not finish; their lines stand above"

    jobs = tmp_path / "sweep"
    assert sorted(path.name for path in jobs.iterdir()) == ["0", "2", "multirun.yaml"]
    status = {job: json.loads((jobs / job / "STATUS.json").read_text()) for job in "02"}
    assert [(status[job]["status"], status[job]["step"]) for job in "02"] == [("failed", 30), ("done", 60)]
    assert [load_config(jobs / job / "config.yaml")[0].controller.kind for job in "02"] == ["custom", "random"]
    accuracy = json.loads((jobs / "2" / "result.json").read_text())["validation_accuracy"]["value"]
    assert [json.loads(line) for line in returned.read_text().splitlines()] == ["failed", "failed", accuracy, "failed"]
    assert not [path for path in tmp_path.iterdir() if path.name in ("outputs", "multirun", "runs")]
