"""fp16 in the trainer: one loss scale for all ranks, torch's own, which lies in every checkpoint."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from esper.config.tree import EsperConfig
from esper.kasmina.slots.grown import HOST
from esper.leyline.errors import CheckpointError, DivergedError
from esper.leyline.events import StepSkipped
from esper.leyline.stages import Stage
from esper.tolaria.training.precision import LossScale
from tests.dist.test_operators import LIVES
from tests.support.dist import run_distributed
from tests.support.small_runs import train_on
from tests.support.tiny import bits, events, make_engine, replica, tiny_config

SPOILED = range(10, 13)  # optimizer steps in which a rank's gradient of the host overflows


def config_of(**settings: Any) -> EsperConfig:
    return tiny_config("cnn", **{"trainer__precision": "fp16", "trainer__steps": 36, **settings})


def spoil(engine: Any, rank: int, steps: range = SPOILED) -> None:
    """Rank 1 (or the only one) gets an infinite gradient of one host parameter."""
    if rank == engine.world.size - 1:
        _, parameter = engine.grown.owner_parameters()[HOST][0]
        parameter.register_hook(lambda grad: grad * torch.inf if engine.step in steps else grad)


def trained(rank: int, config: EsperConfig, run_dir: Path, resume_step: int | None = None) -> dict[str, Any]:
    """A run; scale and every bit of it after each tick."""
    engine = make_engine(config, run_dir, attempt=1 if resume_step is None else 2)
    engine.begin(resume_step)
    spoil(engine, rank)
    ticks, rows = {}, []
    while engine.step < engine.terms.total_steps:
        train_on(engine, engine.step + 1)
        ticks[engine.step] = (engine.scaling.value, replica(engine))
        rows.append(engine.state.skipped_in_row)
    engine.saves.finish(engine.state)
    skipped = sum(event.count for event in events(engine).of(StepSkipped))
    stages = {entry.slot: entry.stage for entry in engine.state.slots}
    engine.world.close()
    return {"ticks": ticks, "row": max(rows), "skipped": skipped, "stages": stages}


def test_ranks_have_one_scale_skip_the_same_steps_and_resume_it(tmp_path: Path) -> None:
    config = config_of(controller=LIVES, checkpoint__every_ticks=2, checkpoint__keep=20)
    mine, theirs = run_distributed(trained, 2, config, tmp_path / "two")
    assert mine["ticks"] == theirs["ticks"]
    scales = {step: scale for step, (scale, _) in mine["ticks"].items()}
    assert scales[10] == 2.0**16
    assert scales[14] == scales[36] == 2.0**13, "the overflow of one rank is not everybody's"
    assert mine["skipped"] == (3 if mine["row"] == 0 else None), "a row of overflows is no fault of the run"
    assert Stage.FOSSILIZED in mine["stages"].values()
    for found in run_distributed(trained, 2, config, tmp_path / "two", 12):  # in the midst of the overflows
        assert found["ticks"] == {step: now for step, now in mine["ticks"].items() if step > 12}


def test_it_is_torch_s_own_loop(tmp_path: Path) -> None:
    settings = {"optim__kind": "sgd", "optim__momentum": 0.0, "optim__clip_norm": None, "optim__weight_decay": 0.0}
    engine = make_engine(config_of(**settings, optim__schedule="constant", optim__warmup_steps=0), tmp_path)
    engine.begin(None)
    spoil(engine, 0)
    model = copy.deepcopy(engine.grown.model)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(model.parameters(), lr=0.01)
    step = 0
    _, parameter = next(iter(model.named_parameters()))
    parameter.register_hook(lambda grad: grad * torch.inf if step in SPOILED else grad)
    for step in range(20):
        batch = engine.bundle.train_batch(engine.plan.indices(step), seed=engine.seed, epoch=0)
        x, y = engine.evaluator.to_device(*batch)
        with torch.autocast("cpu", dtype=torch.float16):
            output = model(x)
        scaler.scale(F.cross_entropy(output, y, reduction="none").float().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        train_on(engine, step + 1)
        assert engine.scaling.value == scaler.get_scale()
    assert isinstance(engine.scaling, LossScale)
    assert engine.scaling.scaler == scaler.state_dict()
    ours, theirs = dict(engine.grown.model.named_parameters()), dict(model.named_parameters())
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-3, atol=1e-4)


def test_what_no_scale_cures_ends_the_run(tmp_path: Path) -> None:
    engine = make_engine(config_of(trainer__steps=100, trainer__max_consecutive=6, governor__enabled=False), tmp_path)
    engine.begin(None)
    spoil(engine, 0, range(4, 100))
    train_on(engine, 4)
    weights = bits(engine.grown.model.named_parameters())
    with pytest.raises(DivergedError, match="6 optimizer steps in a row"):
        train_on(engine, 100)
    assert engine.step == 4 + 16 + 6, "the scale comes down to 1 in 16 steps"
    assert bits(engine.grown.model.named_parameters()) == weights


def test_a_state_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    engine = make_engine(config_of(), tmp_path)
    with pytest.raises(CheckpointError, match="growth_factor"):
        engine.scaling.observers[0].load_state_dict({"scaler": {"scale": 1.0}, "overflows": {}})
