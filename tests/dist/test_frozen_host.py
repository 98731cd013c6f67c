"""The trainer grows seeds on a host that is frozen whole, as adapters, on one rank and on two."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from esper.kasmina.hosts import CustomHostConfig
from tests.support.dist import run_distributed
from tests.support.tiny import act, make_engine, replica, schedule, tiny_config

A = "r0c0"


def build(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        body = [nn.Conv2d(input_shape[0], 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(4, classes)).requires_grad_(False)


def grown(rank: int, run: Path, incubation: str) -> tuple[bool, str, dict[str, Any]]:
    config = tiny_config(
        host=CustomHostConfig(path=f"{__name__}:build", sites={A: "1"}),
        controller=schedule(
            act(1, A, "GERMINATE", blueprint="conv_light", ticks=2), act(3, A, "ADVANCE"), act(5, A, "ADVANCE")
        ),
        slots__incubation=incubation,
        trainer__steps=20,
    )
    engine = make_engine(config, run)
    engine.begin(None)
    before = [parameter.clone() for name, parameter in engine.grown.model.named_parameters() if "esper" not in name]
    engine.run()
    after = [parameter for name, parameter in engine.grown.model.named_parameters() if "esper" not in name]
    found = replica(engine)
    stage = engine.state.slots[0].stage.name
    return all(map(torch.equal, before, after)), stage, found


@pytest.mark.parametrize("incubation", ["shadow", "immediate"])
def test_a_frozen_host_grows_in_the_trainer(incubation: str, tmp_path: Path) -> None:
    (untouched, stage, mine), (_, _, theirs) = run_distributed(grown, 2, tmp_path, incubation)
    assert untouched
    assert stage in ("BLENDING", "HOLDING")
    assert mine == theirs
