"""Parts that do not fit each other are refused when they are joined, before the first step."""

from pathlib import Path

import pytest
import torch
from torch import nn

from esper.accord.state import Terms
from esper.kasmina.hosts import CustomHostConfig, GPTConfig
from esper.leyline.errors import ConfigError
from esper.tamiyo.heuristic_config import HeuristicConfig
from esper.tamiyo.none import NoneConfig
from tests.support.tiny import make_engine, tiny_config


class Bare(nn.Module):
    def __init__(self, outputs: int, wrapped: bool) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(64, 6))
        self.head = nn.Linear(6, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor]:
        logits: torch.Tensor = self.head(self.features(x))
        return (logits,) if self.wrapped else logits


def bare(input_shape: tuple[int, ...], classes: int, outputs: int, wrapped: bool = False) -> nn.Module:
    return Bare(outputs, wrapped)


def join(folder: Path, controller: NoneConfig | HeuristicConfig, **options: object) -> None:
    host = CustomHostConfig(path="tests.run.test_assembly:bare", options=dict(options), sites={"r0c0": "features"})
    make_engine(tiny_config(host=host, controller=controller), folder)


def test_a_host_gives_a_logit_for_each_class_or_more(tmp_path: Path) -> None:
    join(tmp_path / "padded", NoneConfig(), outputs=16)
    join(tmp_path / "wrapped", NoneConfig(), outputs=10, wrapped=True)  # the first tensor of a tuple counts
    for options, got in (({"outputs": 7}, r"\[2, 7\]"), ({"outputs": 7, "wrapped": True}, r"\[2, 7\]")):
        with pytest.raises(ConfigError, match=rf"it returns {got}, expected logits \[2, 10\], one for each class"):
            join(tmp_path / str(options), NoneConfig(), **options)


def test_blueprints_that_fit_no_slot_are_refused_before_training(tmp_path: Path) -> None:
    join(tmp_path / "fits", HeuristicConfig(blueprints=["mlp"]), outputs=10)
    with pytest.raises(
        ConfigError, match=r"controller\.blueprints: conv_light fits no slot of this host; it takes lora,"
    ):
        join(tmp_path / "misfit", HeuristicConfig(blueprints=["conv_light", "mlp"]), outputs=10)


def test_blueprints_that_only_a_learning_layer_would_take_are_refused_before_training(tmp_path: Path) -> None:
    def start(folder: str, *asked: str, freeze: str = "none", **settings: object) -> Terms:
        host = GPTConfig(layers=1, heads=2, dim=16, block=16, sites=["mlp"], freeze=freeze)
        config = tiny_config("gpt", host=host, controller=HeuristicConfig(blueprints=list(asked)), **settings)
        return make_engine(config, tmp_path / folder).terms

    with pytest.raises(ConfigError, match=r"no slot takes lora: lora folds into blocks\.0\.down, which learns itself"):
        start("learns", "lora")
    told = {info.name: info.folds_into for info in start("other", "mlp").catalogue["r0c2"]}
    assert {name for name, layer in told.items() if layer is not None} == {"lora", "lora_large"}
    for terms in (
        start("frozen", "lora", freeze="all"),
        start("asked", "lora", gates__allow_foldable=True),
    ):
        assert not any(info.folds_into for info in terms.catalogue["r0c2"])
