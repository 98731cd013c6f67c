"""Every task on two ranks is what it is on one, to 1e-9 in float64, with growth, and a stop and a resume across it.

One launch for all tasks: in each the two ranks train to a checkpoint between the birth and the blending, end, meet
anew, go on from it, and come to what one rank came to that nobody stopped.
"""

from pathlib import Path
from typing import Any

import pytest

from esper.leyline.errors import Preempted
from esper.leyline.stages import Stage
from tests.support.dist import run_distributed, use_group
from tests.support.tiny import make_engine
from tests.support.toy_tasks import TOYS, toy_config

FEW = ["mse", "segmentation", "contrastive", "counting"]
SHORT = {"trainer__steps": 36, "control__every": 4, "trainer__batch": 30, "trainer__accumulate": 2}
STOP = 16  # optimizer steps: after the birth, before the end of the ramp


def config_of(name: str) -> Any:
    return toy_config(name, **{**SHORT, **({"trainer__batch": 16} if name == "contrastive" else {})})


def summary(engine: Any, result: Any) -> dict[str, Any]:
    model = engine.grown.model
    return {
        "parameters": {name: p.detach().clone() for name, p in model.named_parameters()},
        "scores": [result.validation_loss.value, result.test_loss.value, *result.test_metrics.values()],
        "metrics": {entry.name: entry.reading.value for entry in engine.state.metrics},
        "stage": engine.state.slots[0].stage,
        "samples": result.samples,
    }


def in_two_goes(rank: int, names: list[str], folder: Path) -> dict[str, Any]:
    found = {}
    for index, name in enumerate(names):
        use_group(2 * index)
        engine = make_engine(config_of(name), folder / name)
        engine.begin(None)
        while engine.step < STOP:
            engine.train_step()
            if engine.tick_due():
                engine.stop_asked = engine.step == STOP
                try:
                    engine.tick()
                except Preempted:
                    break
        engine.saver.close()
        engine.world.close()
        use_group(2 * index + 1)
        engine = make_engine(config_of(name), folder / name, attempt=2)
        engine.begin(STOP)
        found[name] = summary(engine, engine.run())
        engine.saver.close()
        engine.world.close()
    return found


@pytest.mark.parametrize("names", [FEW, pytest.param(list(TOYS), marks=pytest.mark.slow)], ids=["few", "all"])
def test_two_ranks_that_were_stopped_are_one_that_was_not(names: list[str], tmp_path: Path) -> None:
    both = run_distributed(in_two_goes, 2, names, tmp_path, groups=2 * len(names))
    for name in names:
        engine = make_engine(config_of(name), tmp_path / f"{name}-alone")
        engine.begin(None)
        alone = summary(engine, engine.run())
        assert alone["stage"] in (Stage.BLENDING, Stage.HOLDING)
        for found in (rank[name] for rank in both):
            assert found["samples"] == alone["samples"]
            assert found["stage"] is alone["stage"]
            assert found["scores"] == pytest.approx(alone["scores"], abs=1e-9), name
            assert found["metrics"] == pytest.approx(alone["metrics"], abs=1e-9), name
            for key, value in alone["parameters"].items():
                assert float((found["parameters"][key] - value).abs().max()) < 1e-9, (name, key)
