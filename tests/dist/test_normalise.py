"""normalise=tokens: a step's loss is the mean over all positions that count, on any number of ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from esper.leyline.errors import ConfigError
from tests.support.collective_counter import CollectiveCounter
from tests.support.dist import run_distributed, use_group
from tests.support.tiny import make_engine
from tests.support.toy_tasks import toy_config

STEPS = 6
RAGGED = {"trainer__batch": 14, "trainer__accumulate": 3, "trainer__steps": STEPS, "control__every": 100}


def config_of(normalise: str, **settings: Any) -> Any:
    config = toy_config("seq2seq", **{**RAGGED, **settings})
    config.data.options = {"task": "ragged"}
    config.task.normalise = type(config.task.normalise)(normalise)
    return config


def trained(folder: Path, normalise: str) -> dict[str, Any]:
    engine = make_engine(config_of(normalise), folder / normalise)
    engine.begin(None)
    engine.train_step()  # DDP lays out its buckets anew after the first
    with CollectiveCounter() as counter:
        while engine.step < STEPS:
            engine.train_step()
    parameters = {name: p.detach().clone() for name, p in engine.grown.model.named_parameters()}
    engine.saver.close()
    engine.world.close()
    return {"parameters": parameters, "reductions": counter.kinds().get("allreduce_", 0), "sizes": counter.sizes}


def both(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for index, normalise in enumerate(("samples", "tokens")):
        use_group(index)
        found[normalise] = trained(folder, normalise)
    return found


def test_two_ranks_are_one_and_a_step_costs_one_scalar(tmp_path: Path) -> None:
    ranks = run_distributed(both, 2, tmp_path, groups=2)
    alone = trained(tmp_path / "alone", "tokens")
    for found in ranks:
        assert found["tokens"]["reductions"] == found["samples"]["reductions"] + STEPS - 1
        assert sum(found["tokens"]["sizes"]) == sum(found["samples"]["sizes"]) + 8 * (STEPS - 1)
        for name, value in alone["parameters"].items():
            assert float((found["tokens"]["parameters"][name] - value).abs().max()) < 1e-9, name
    apart = [found["samples"]["parameters"]["head.bias"] - alone["parameters"]["head.bias"] for found in ranks]
    assert all(float(one.abs().max()) > 1e-3 for one in apart), "the two means differ on this data"


def test_the_loss_of_a_step_is_torchs_own_mean_over_labels(tmp_path: Path) -> None:
    engine = make_engine(config_of("tokens"), tmp_path)
    engine.begin(None)
    pieces = engine.feed.pieces(0)
    scale = engine.feed.scale(0, pieces, 0)
    losses, logits, labels = [], [], []
    for indices, weights in pieces:
        x, y = engine.feed.batch(indices, 0)
        losses.append(float(engine._loss(x, y, weights, scale).detach()))
        logits.append(engine.grown.model(**x)["logits"].detach().flatten(0, 1))
        labels.append(y.flatten())
    wanted = F.cross_entropy(torch.cat(logits), torch.cat(labels), ignore_index=-100)
    assert sum(losses) == pytest.approx(float(wanted), abs=1e-12)


def test_a_forward_holds_no_more_tokens_than_asked_for(tmp_path: Path) -> None:
    engine = make_engine(config_of("tokens", trainer__max_tokens=30), tmp_path)  # nine tokens each
    assert [len(indices) for indices, _ in engine.feed.pieces(0)] == [3, 3, 3, 3, 2]
    with pytest.raises(ConfigError, match=r"trainer\.max_tokens = 8: a sample has 9 tokens; set trainer\.max_tokens=9"):
        make_engine(config_of("tokens", trainer__max_tokens=8), tmp_path / "few")
    with pytest.raises(ConfigError, match="gives numbers and no tokens"):
        make_engine(toy_config("mse", trainer__max_tokens=8), tmp_path / "none")
