"""Guards of growth and of training that no other test makes fire."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.leyline.errors import CheckpointError, ConfigError
from esper.tolaria.growth.planting import _take_moments
from esper.tolaria.growth.staging import Unfit, check_forward
from esper.tolaria.lockstep.ema import WeightAverage
from esper.tolaria.training.patience import Improvement
from esper.tolaria.training.precision import LossScale
from tests.support.refusals import fails
from tests.support.sessions import A, batch, host

X = batch(0, 2)[0]


def average_of(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[], None]:
    def load() -> None:
        average = WeightAverage(esper.attach(host(), {A: "0"}, X), 0.9)
        average.load_state_dict(change(average.state_dict()))

    return load


def longer(state: dict[str, Any]) -> dict[str, Any]:
    name, tensor = next(iter(state["averages"].items()))
    return {**state, "averages": {**state["averages"], name: tensor[:1]}}


def take_moments() -> None:
    source, to = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adagrad([source])
    source.grad = torch.ones(2)
    optimizer.step()
    _take_moments(optimizer, to, source, 0.5)


def stage() -> None:
    site = esper.attach(host(), {A: "0"}, X).sites[A]
    check_forward(nn.Conv2d(4, 5, 1).double(), site, "odd", dtype=torch.float64, device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (
            lambda: Improvement("loss", False, 0.0).load_state_dict({"best": 1.0}),
            CheckpointError,
            "^observers: 'bad' is missing$",
        ),
        (
            lambda: LossScale(SimpleNamespace()).load_state_dict({}),  # type: ignore[arg-type]
            CheckpointError,
            "^loss scale: .*scale.* and overflows are what it has$",
        ),
        (
            average_of(lambda state: {**state, "decay": 0.5}),
            CheckpointError,
            r"^ema: saved with the decay 0\.5, this is 0\.9$",
        ),
        (average_of(longer), CheckpointError, r"^ema: .*0\.weight is \(1, .*\) for a parameter \(4, "),
        (take_moments, ConfigError, r"^slots\.copy_moments: Adagrad keeps sum; set it to 0$"),
        (stage, Unfit, r"^odd maps \(1, 4, 6, 6\) torch\.float64 to \(1, 5, 6, 6\) torch\.float64$"),
    ],
)
def test_growth_and_training(call: Callable[[], Any], kind: type[Exception], text: str) -> None:
    fails(call, kind, text)
