"""A host that draws from `random` and numpy: seeded, replayed and saved as torch's own streams are.

One process; `tests/dist/test_resume.py` kills whole workers of such a host.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from esper.config.tree import EsperConfig
from esper.kasmina.hosts import registry
from tests.support.noisy_host import Noisy
from tests.support.tiny import act, bits, make_engine, schedule, tiny_config

STEPS = 16
LEARNING = schedule(
    act(1, "r0c0", "GERMINATE", blueprint="depthwise"),
    act(1, "r1c0", "GERMINATE", blueprint="conv_small"),
    act(3, "r0c0", "ADVANCE"),
    act(3, "r1c0", "ADVANCE"),
)


@dataclass(kw_only=True, slots=True)
class DrawingConfig:
    kind: str = "drawing"


class Drawing(Noisy):
    """Scales each batch by numbers of Python's and numpy's global streams while it trains."""

    def __init__(self, classes: int) -> None:
        super().__init__(classes)
        with torch.no_grad():  # first weights that are drawn elsewhere, too
            self.head.bias.copy_(torch.from_numpy(np.random.standard_normal(classes)))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * (0.5 + random.random()) * (0.5 + float(np.random.rand()))
        return super().forward(x)


def build_drawing(config: DrawingConfig, *, input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Drawing(classes)


@pytest.fixture(autouse=True)
def _drawing_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "HOSTS", dict(registry.HOSTS))
    registry.HOSTS["drawing"] = registry.HostKind(DrawingConfig, build_drawing)


def config_of(**settings: Any) -> EsperConfig:
    common = {"trainer__steps": STEPS, "control__every": 2, "slots__incubation": "shadow", **settings}
    return tiny_config("cnn", host=DrawingConfig(), **common)


def stir(salt: int) -> None:
    """Another program has drawn before, each time something else."""
    random.seed(salt)
    np.random.seed(salt)


def host_of(config: EsperConfig, folder: Path, steps: int = STEPS) -> dict[str, Any]:
    engine = make_engine(config, folder)
    engine.begin(None)
    while engine.step < steps:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
    host = [(name, p) for name, p in engine.grown.model.named_parameters() if "esper_slots" not in name]
    streams = (torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()))
    return {"host": bits(host), "buffers": bits(list(engine.grown.model.named_buffers())), "streams": streams}


def test_one_seed_is_one_run_whatever_was_drawn_before(tmp_path):
    stir(1)
    first = host_of(config_of(), tmp_path / "a")
    stir(2)
    assert host_of(config_of(), tmp_path / "b") == first
    assert host_of(config_of(seed=2), tmp_path / "c")["host"] != first["host"]


def test_incubation_does_not_move_a_host_that_draws(tmp_path):
    alone = host_of(config_of(), tmp_path / "a")
    beside = host_of(config_of(controller=LEARNING), tmp_path / "b")
    assert beside["host"] == alone["host"]
    assert beside["streams"] == alone["streams"]


def test_a_resume_goes_on_with_the_streams(tmp_path):
    settings = {"checkpoint__every_ticks": 4, "controller": LEARNING}
    whole = make_engine(config_of(**settings), tmp_path / "whole")
    whole.begin(None)
    whole.run()
    stir(3)
    resumed = make_engine(config_of(**settings), tmp_path / "whole")
    resumed.begin(8)
    resumed.run()
    assert bits(list(resumed.grown.model.state_dict().items())) == bits(list(whole.grown.model.state_dict().items()))
