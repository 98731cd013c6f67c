"""A run ends, or cuts its rate, where a metric stops improving; quick tries; clipping per owner."""

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.leyline.errors import ConfigError, Preempted
from esper.leyline.events import EarlyStopped, RateCut
from tests.support.tiny import events, make_engine, replica
from tests.support.toy_tasks import toy_config


def config(**more: Any) -> Any:
    base: dict[str, Any] = {
        "controller": {"kind": "none"},
        "trainer__steps": 60,
        "control__every": 2,
        "optim__schedule": "constant",
    }
    return toy_config("counting", **{**base, **more})


def test_a_run_ends_where_its_metric_stops_improving_also_after_a_resume(tmp_path: Path) -> None:
    how = config(trainer__watch="validation_loss", trainer__patience=3, trainer__min_improvement=0.5)
    engine = make_engine(how, tmp_path / "whole")
    engine.begin(None)
    result = engine.run()
    assert result.step < 60
    assert engine.saver.store.steps()[-1] == result.step, "it is saved where it ends"
    (told,) = events(engine).of(EarlyStopped)
    assert (told.step, told.metric, told.ticks) == (result.step, "validation_loss", 3)
    assert result.best_step is not None

    engine = make_engine(how, tmp_path / "twice")
    engine.begin(None)
    while engine.step < result.step - 2:
        engine.train_step()
        if engine.tick_due():
            engine.stop_asked = engine.step == result.step - 2
            try:
                engine.tick()
            except Preempted:
                break
    again = make_engine(how, tmp_path / "twice", attempt=2)
    again.begin(engine.step)
    assert again.run().step == result.step


def test_the_rate_is_cut_as_torch_cuts_it(tmp_path: Path) -> None:
    how = config(
        trainer__watch="validation_loss",
        trainer__min_improvement=0.2,
        optim__schedule="plateau",
        optim__plateau_patience=1,
        optim__plateau_factor=0.5,
    )
    engine = make_engine(how, tmp_path)
    engine.begin(None)
    parameter = torch.nn.Parameter(torch.zeros(()))
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch.optim.SGD([parameter], lr=how.optim.lr), factor=0.5, patience=1, threshold=0.2, threshold_mode="abs"
    )
    while engine.step < 60:
        engine.train_step()
        assert engine.owner.optimizer.param_groups[0]["lr"] == theirs.optimizer.param_groups[0]["lr"]
        if engine.tick_due():
            engine.tick()
            assert engine.state.validation_loss.value is not None
            theirs.step(engine.state.validation_loss.value)
    cuts = events(engine).of(RateCut)
    assert len(cuts) >= 2
    assert cuts[-1].lr == theirs.optimizer.param_groups[0]["lr"]


def test_a_quick_try_takes_a_few_steps_of_everything(tmp_path: Path) -> None:
    engine = make_engine(config(trainer__limit=3, trainer__eval_batch=5), tmp_path)
    engine.begin(None)
    result = engine.run()
    assert result.step == 3
    assert result.validation_loss.n == result.test_loss.n == 15


def test_owners_are_clipped_each_by_its_norm(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"optim.clip_norms: r9c9 is no owner; there are host, r0c0"):
        make_engine(config(optim__clip_norms={"r9c9": 1.0}), tmp_path / "unknown")
    same = []
    for name, how in (("one", {"optim__clip_norm": 0.01}), ("named", {"optim__clip_norms": {"host": 0.01}})):
        engine = make_engine(config(trainer__steps=4, optim__kind="sgd", **how), tmp_path / name)
        engine.begin(None)
        engine.run()
        same.append(replica(engine)["parameters"])
    assert same[0] == same[1]


def test_a_metric_that_the_task_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer.watch = 'validation_f1': the task Counting has no such metric"):
        make_engine(config(trainer__watch="validation_f1", trainer__patience=2), tmp_path / "watch")
    with pytest.raises(
        ConfigError, match=r"trainer.objective = 'validation_f1'.*it has validation_loss, validation_ratio"
    ):
        make_engine(config(trainer__objective="validation_f1"), tmp_path / "objective")
