"""N ranks train what one rank trains on the same global batches: in float64 to 1e-9, with the same decisions.

The runs grow at least twice, on evidence: the heuristic under enforced gates, on data that it has not seen before. The
training part is cut so that the last batch of an epoch is ragged: one sample in the CNN's, which is fewer than ranks
times accumulation windows, six in the GPT's.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from esper.config.tree import EsperConfig
from esper.leyline.events import CommandJudged, StageChanged, TickDone
from esper.leyline.plain import to_plain
from esper.leyline.stages import Stage
from esper.tamiyo.heuristic_config import HeuristicConfig
from esper.tolaria.data import DigitsConfig, PySourceConfig, load_data
from esper.tolaria.data.sampler import BatchPlan
from tests.support.dist import run_distributed
from tests.support.tiny import events, make_engine, replica, tiny_config

TOLERANCE = 1e-9
DATA = {
    "cnn": DigitsConfig(validation=40, probe=512, test=944),  # leaves 301 for training
    "gpt": PySourceConfig(block=16, max_bytes=11_952, validation=33, probe=512, test=8),  # leaves 150
}
BLUEPRINTS = {"cnn": ["conv_small", "bottleneck"], "gpt": ["mlp_small"]}
BATCH = {"cnn": (20, 1), "gpt": (16, 6)}  # samples in a batch, and in the last one of an epoch
LR = {("cnn", "sgd"): 0.1, ("cnn", "adamw"): 0.01, ("gpt", "sgd"): 0.1, ("gpt", "adamw"): 0.01}
STEPS = 72


def config_of(task: str, optimizer: str) -> EsperConfig:
    return tiny_config(
        task,
        data=DATA[task],
        trainer__steps=STEPS,
        trainer__batch=BATCH[task][0],
        trainer__accumulate=2,
        trainer__precision="fp64",
        control__every=4,
        control__attribute_every=4,
        optim__kind=optimizer,
        optim__lr=LR[task, optimizer],
        gates__evidence="observe",  # in so short a run little is shown; what was measured must still be the same
        gates__probe_samples=64,
        gates__min_samples=32,
        controller=HeuristicConfig(
            warmup_ticks=1, life_ticks=4, tempo_ticks=2, blueprints=BLUEPRINTS[task], spread=True
        ),
    )


def trained(rank: int, config: EsperConfig, run_dir: Path) -> dict[str, Any]:
    """Trains to the end; what this rank then holds, and on rank 0 what was decided on the way."""
    engine = make_engine(config, run_dir)
    engine.begin(None)
    result = engine.run()
    tensors = {name: tensor.detach() for name, tensor in engine.grown.model.state_dict().items()}
    for name, entries in engine.owner.state_by_name().items():
        tensors |= {f"{name}.{key}": tensor for key, tensor in entries.items()}
    sink = events(engine)
    return {
        "replica": replica(engine),
        "tensors": tensors,
        "stages": [to_plain(event) for event in sink.of(StageChanged)],
        "commands": [
            (e.tick, e.command.slot, e.command.op, e.command.blueprint, e.applied) for e in sink.of(CommandJudged)
        ],
        "losses": [(e.train_loss, e.validation_loss, e.host_gradient_norm) for e in sink.of(TickDone)],
        "result": to_plain(result),
    }


def same_numbers(found: Any, wanted: Any, where: str = "") -> None:
    """Plain data: equal, and floats within the tolerance."""
    if isinstance(wanted, float):
        assert found == pytest.approx(wanted, rel=TOLERANCE, abs=TOLERANCE), where
    elif isinstance(wanted, dict):
        assert found.keys() == wanted.keys(), where
        for key in wanted:
            same_numbers(found[key], wanted[key], f"{where}.{key}")
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted), where
        for index, item in enumerate(wanted):
            same_numbers(found[index], item, f"{where}[{index}]")
    else:
        assert found == wanted, where


def same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=TOLERANCE, atol=TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
        )


def take_flops(found: dict[str, Any]) -> int:
    """The FLOPs of a run, which are taken out of what is compared: what every rank repeats is charged to each."""
    state = found["replica"]["state"] = dict(found["replica"]["state"])
    result = found["result"] = dict(found["result"])
    flops = int(state.pop("flops"))
    assert result.pop("flops") == flops
    return flops


@pytest.mark.parametrize(
    ("task", "optimizer"),
    [
        ("cnn", "sgd"),
        ("gpt", "adamw"),
        pytest.param("cnn", "adamw", marks=pytest.mark.slow),  # each host and each optimizer is above
        pytest.param("gpt", "sgd", marks=pytest.mark.slow),
    ],
)
def test_n_ranks_train_what_one_rank_trains(task: str, optimizer: str, tmp_path: Path) -> None:
    config = config_of(task, optimizer)
    bundle = load_data(config.data)
    plan = BatchPlan(len(bundle.train), config.trainer.batch, config.seed)
    assert len(plan.indices(plan.steps_per_epoch - 1)) == BATCH[task][1]
    assert plan.steps_per_epoch * 2 < STEPS

    alone = trained(0, config, tmp_path / "1")
    assert all(tensor.dtype == torch.float64 for name, tensor in alone["tensors"].items() if tensor.ndim > 0)
    grown = [change for change in alone["stages"] if change["target"] == Stage.FOSSILIZED.name]
    assert len(grown) >= 2, "the run must grow twice, or it shows nothing"
    worth = [slot["worth"]["shapley"]["value"] for slot in alone["replica"]["state"]["slots"]]
    assert sum(value is not None for value in worth) >= 2, "attributed at the last tick"
    once = take_flops(alone)
    repeated: dict[int, int] = {}
    for world in (2, 3):
        ranks = run_distributed(trained, world, config, tmp_path / str(world))
        for rank in ranks[1:]:
            assert rank["replica"] == ranks[0]["replica"]
        found = ranks[0]
        repeated[world] = take_flops(found) - once
        assert found["stages"] == alone["stages"]
        assert found["commands"] == alone["commands"]
        same_tensors(found["tensors"], alone["tensors"])
        same_numbers(found["replica"]["state"], alone["replica"]["state"])
        same_numbers(to_plain(found["losses"]), to_plain(alone["losses"]))
        same_numbers(found["result"], alone["result"])
    assert repeated[3] == 2 * repeated[2] > 0, "each rank looks at every birth by itself, and the account says so"
