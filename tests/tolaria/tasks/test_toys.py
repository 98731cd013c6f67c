"""Every shipped task, and one of a user's own, learns its toy to the known optimum, with a birth in the middle."""

from pathlib import Path

import pytest

from esper.leyline.stages import Stage
from tests.support.tiny import make_engine
from tests.support.toy_tasks import TOYS, toy_config


@pytest.mark.parametrize("name", TOYS)
def test_a_task_comes_to_the_least_loss_there_is(name: str, tmp_path: Path) -> None:
    engine = make_engine(toy_config(name), tmp_path)
    engine.begin(None)
    result = engine.run()
    assert engine.state.slots[0].stage in (Stage.BLENDING, Stage.HOLDING), "it grew"
    for reading in (result.validation_loss, result.test_loss):
        assert reading.value is not None
        assert TOYS[name].least - 1e-6 <= reading.value <= TOYS[name].least + TOYS[name].near, name
    graded = engine.task.graded
    assert graded == (name not in ("mse", "l1", "huber", "counting"))
    assert (result.test_accuracy.value is not None) == (result.validation_accuracy.value is not None) == graded
    assert set(result.test_metrics) == {metric.info.name for metric in engine.task.metrics}
    assert result.objective is not None
