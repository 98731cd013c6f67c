"""Weights that a host starts from, and parts of it that do not learn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from esper.kasmina.hosts import CNNConfig, GPTConfig, HFConfig, ResNet20Config, build_host, freeze
from esper.leyline.errors import ConfigError
from esper.run.assembly import build_grown
from esper.run.start.begin import begin_elsewhere
from esper.run.start.weights import load_weights_from
from esper.tolaria.data import load_data
from tests.support.bitwise import bits
from tests.support.tiny import make_engine, tiny_config

GPT = {"layers": 1, "heads": 2, "dim": 8, "block": 16}


def trained(**settings: Any) -> nn.Module:
    torch.manual_seed(11)
    return build_host(GPTConfig(**{**GPT, **settings}), (16,), 256)


def load(weights: Path, **settings: Any) -> tuple[nn.Module, dict[str, Any] | None]:
    config = tiny_config("gpt", host=GPTConfig(**GPT, weights=str(weights), **settings))
    grown = build_grown(config, load_data(config.data), torch.device("cpu"))
    return grown.model, load_weights_from(config, grown.model)


@pytest.mark.parametrize("kind", ["safetensors", "state dict", "folder"])
def test_files_and_folders_are_loaded_as_they_are(kind: str, tmp_path: Path) -> None:
    state = trained().state_dict()
    untied = {name: tensor for name, tensor in state.items() if name != "head.weight"}  # one name of the tied two
    path = tmp_path / {"safetensors": "w.safetensors", "state dict": "w.pt", "folder": "model.safetensors"}[kind]
    if kind == "state dict":
        torch.save(state, path)
    else:
        save_file(untied, path)
    model, record = load(tmp_path if kind == "folder" else path)
    assert all(bits(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert record is not None
    assert len(record["digest"]) == 16


def test_the_average_begins_with_the_loaded_weights(tmp_path: Path) -> None:
    state = trained().state_dict()
    torch.save(state, tmp_path / "w.pt")
    host = GPTConfig(**GPT, weights=str(tmp_path / "w.pt"))
    config = tiny_config("gpt", host=host, trainer__steps=8, trainer__ema=0.9)
    engine = make_engine(config, tmp_path)
    begin_elsewhere(config, engine, tmp_path, None)
    engine.begin(None)
    assert engine.average is not None
    assert engine.average.averages
    assert all(bits(average, state[name]) for name, average in engine.average.averages.items())
    engine.saver.close()
    engine.world.close()


def test_a_run_is_loaded_at_the_chosen_or_the_named_step(tmp_path: Path) -> None:
    from tests.support.killed_runs import prepare_run
    from tests.support.tiny import tiny_plain

    plain = tiny_plain("gpt", host=GPTConfig(**GPT), trainer__steps=8, checkpoint__every_ticks=2, checkpoint__keep=4)
    run = prepare_run(tmp_path / "run", plain)
    config = tiny_config("gpt", host=GPTConfig(**GPT), trainer__steps=8, checkpoint__every_ticks=2, checkpoint__keep=4)
    engine = make_engine(config, run)
    engine.begin(None)
    while engine.step < 8:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
        if engine.step == 4:
            state = {name: tensor.clone() for name, tensor in engine.grown.model.state_dict().items()}
    engine.saver.close()
    engine.world.close()
    model, record = load(run, weights_step=4)
    assert all(bits(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert record is not None
    assert record["weights"].endswith("step 4")
    with pytest.raises(ConfigError, match=r"no checkpoint of host\.weights_step = 5; there are 4"):
        load(run, weights_step=5)


def test_what_does_not_fit_says_what(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save(trained(dim=16).state_dict(), path)
    with pytest.raises(ConfigError, match=r"of another shape: blocks\.0\.down\.bias \(16,\), the host has \(8,\)"):
        load(path)
    torch.save(trained(layers=2).state_dict(), path)
    with pytest.raises(ConfigError, match=r"unknown: blocks\.1\."):
        load(path)
    state = trained().state_dict()
    del state["norm.weight"]
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"missing: norm\.weight"):
        load(path)
    torch.save({"model": state}, path)
    with pytest.raises(ConfigError, match="holds no state dict"):
        load(path)
    with pytest.raises(ConfigError, match="is not there"):
        load(tmp_path / "none")
    with pytest.raises(ConfigError, match="holds neither a run nor"):
        load(tmp_path)


def test_a_frozen_host_does_not_learn_and_keeps_its_statistics() -> None:
    torch.manual_seed(1)
    host = build_host(ResNet20Config(width=2), (1, 8, 8), 10)
    x = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        host(x)
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    freeze(host, "all")
    host(x)
    assert not any(parameter.requires_grad for parameter in host.parameters())
    assert all(bits(tensor, before[name]) for name, tensor in host.state_dict().items())
    other = build_host(GPTConfig(**GPT), (16,), 256)
    freeze(other, r"blocks\..*")
    assert {name.split(".")[0] for name, p in other.named_parameters() if p.requires_grad} == {
        "tokens",
        "positions",
        "norm",
    }
    with pytest.raises(ConfigError, match="matches no parameter"):
        freeze(other, "block")
    with pytest.raises(ConfigError, match="no regular expression"):
        CNNConfig(freeze="(")


@pytest.mark.parametrize(
    ("path", "options", "shape"),
    [
        ("gpt2", {"vocab_size": 256, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}, (16,)),
        ("resnet", {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [2, 2], "layer_type": "basic"}, (3, 32, 32)),
    ],
)
def test_a_model_of_transformers_is_a_host(path: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    host = build_host(HFConfig(path=path, options=options), shape, 256 if len(shape) == 1 else 5)
    x = torch.randint(0, 256, (2, *shape)) if len(shape) == 1 else torch.randn(2, *shape)
    assert host(x).shape == ((2, 16, 256) if len(shape) == 1 else (2, 5))
    assert [point.slot for point in host.injection_points()] == ["r0c0", "r1c0"]
    with pytest.raises(ConfigError, match="n_embed is no setting of"):
        build_host(HFConfig(path=path, options={"n_embed": 8}), shape, 256)
    with pytest.raises(ConfigError, match=r"host\.path = 'no_such_model'"):
        build_host(HFConfig(path="no_such_model"), shape, 256)
