"""Configs that are made in Python: text in a field of an enum is its member, or an error by name."""

import dataclasses

import pytest

from esper.accord.config import EvidencePolicy, GateConfig, SlotsConfig
from esper.leyline.alpha import Curve
from esper.leyline.errors import ConfigError
from esper.leyline.stages import Incubation
from esper.tamiyo.heuristic_config import HeuristicConfig, PlateauMetric, Undecided
from esper.tolaria.training.config import Precision, TrainerConfig


def test_text_names_a_member_by_value_or_by_name() -> None:
    config = HeuristicConfig(undecided="prune", plateau_metric="TRAIN", curve="linear")  # type: ignore[arg-type]
    assert config.undecided is Undecided.PRUNE
    assert config.plateau_metric is PlateauMetric.TRAIN
    assert config.curve is Curve.LINEAR
    assert dataclasses.replace(config, undecided="hold").undecided is Undecided.HOLD  # type: ignore[arg-type]
    assert SlotsConfig(incubation="ste").incubation is Incubation.STE  # type: ignore[arg-type]
    assert GateConfig(evidence="observe").evidence is EvidencePolicy.OBSERVE  # type: ignore[arg-type]
    assert TrainerConfig(precision="bf16").precision is Precision.BF16  # type: ignore[arg-type]
    assert HeuristicConfig(undecided=Undecided.PRUNE).undecided is Undecided.PRUNE


@pytest.mark.parametrize("value", ["never", 1, None, True, PlateauMetric.TRAIN])
def test_anything_else_is_an_error_that_lists_them(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^undecided = .*: must be one of hold, prune$"):
        HeuristicConfig(undecided=value)  # type: ignore[arg-type]
