"""bf16 and the deterministic mode on two ranks: lower precision, the same lockstep."""

from pathlib import Path
from typing import Any

import pytest
import torch

from esper import worker
from esper.leyline.events import StageChanged, TickDone
from esper.tolaria.training.precision import autocast
from tests.support.dist import DEVICES, run_distributed
from tests.support.killed_runs import assert_same_run, final, prepare_run
from tests.support.tiny import act, events, make_engine, replica, schedule, tiny_config, tiny_plain

BLUEPRINT = {"cnn": "conv_small", "gpt": "mlp_small"}
SLOT = "r0c0"


def growth(task: str) -> dict[str, Any]:
    """One life from birth to fossil."""
    return schedule(
        act(1, SLOT, "GERMINATE", blueprint=BLUEPRINT[task], ticks=2),
        act(3, SLOT, "ADVANCE"),
        act(5, SLOT, "ADVANCE"),
        act(8, SLOT, "ADVANCE"),
        act(10, SLOT, "FOSSILIZE"),
    )


def live(rank: int, task: str, plain_of: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    config = tiny_config(task, **plain_of)
    engine = make_engine(config, run_dir)
    engine.begin(None)
    with autocast(config.trainer.precision, engine.world.device), torch.no_grad():
        computed = engine.grown.model(engine.bundle.example().to(engine.world.device)).dtype
    replicas = []
    while engine.step < engine.terms.total_steps:
        engine.train_step()
        if engine.tick_due():
            engine.tick()
            replicas.append(replica(engine))
    ticks = events(engine).of(TickDone)
    model = engine.grown.model
    return {
        "replicas": replicas,
        "losses": [event.validation_loss.value for event in ticks],
        "stages": [event.target.name for event in events(engine).of(StageChanged) if event.slot == SLOT],
        "computed in": str(computed),
        "kept in": {str(parameter.dtype) for parameter in model.parameters()},
        "moments in": {str(t.dtype) for entry in engine.owner.state_by_name().values() for t in entry.values()},
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("task", ["cnn", "gpt"])
def test_bf16_stays_in_lockstep_and_learns(task: str, device: str, tmp_path: Path) -> None:
    arms = {}
    for precision in ("bf16", "fp32"):
        settings = {
            "trainer__precision": precision,
            "trainer__steps": 96,
            "control__every": 8,
            "trainer__batch": 32,
            "controller": growth(task),
            "optim__lr": 0.03,
            "world__device": device,
        }
        ranks = run_distributed(live, 2, task, settings, tmp_path / precision, device=device)
        for one, other in zip(ranks[0]["replicas"], ranks[1]["replicas"], strict=True):
            assert one == other
        arms[precision] = ranks[0]
    half, full = arms["bf16"], arms["fp32"]
    assert half["stages"] == full["stages"] == ["GERMINATED", "TRAINING", "BLENDING", "HOLDING", "FOSSILIZED"]
    assert (half["computed in"], full["computed in"]) == ("torch.bfloat16", "torch.float32")
    assert half["kept in"] == half["moments in"] == {"torch.float32"}
    assert half["replicas"][-1]["parameters"] != full["replicas"][-1]["parameters"], "it computed in another format"
    assert half["losses"][-1] < 0.95 * half["losses"][0]
    assert half["losses"][-1] == pytest.approx(full["losses"][-1], rel=0.15)


def work(rank: int, run_dir: Path) -> tuple[int, bool]:
    """The worker itself, which sets the mode."""
    code = worker.run(run_dir / "config.yaml")
    return code, torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("task", ["cnn", "gpt"])
def test_deterministic_mode_trains_and_repeats_itself(task: str, tmp_path: Path) -> None:
    outcomes = []
    for name in ("first", "second"):
        plain = tiny_plain(
            task,
            trainer__deterministic=True,
            trainer__precision="bf16",
            trainer__steps=36,
            control__every=3,
            controller=growth(task),
            telemetry__level="full",
        )
        run_dir = prepare_run(tmp_path / name, plain)
        assert run_distributed(work, 2, run_dir) == [(0, True), (0, True)]
        outcomes.append(final(run_dir))
    assert_same_run(*outcomes)
