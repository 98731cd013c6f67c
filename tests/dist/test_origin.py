"""A new run that goes on from the stable part of another one: the same bits as one long run, its costs told apart."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from esper.leyline.errors import ConfigError
from esper.run.start.origin import find_origin
from esper.tolaria.growth.config import OptimConfig, Schedule
from esper.tolaria.growth.policy import lr_shape, stable_until
from tests.support.killed_runs import Kill, final, live, prepare_run
from tests.support.tiny import act, schedule, tiny_config, tiny_plain

GROWING = schedule(
    act(1, "r0c0", "GERMINATE", blueprint="mlp_small", ticks=1),
    act(3, "r0c0", "ADVANCE"),
    act(5, "r0c0", "ADVANCE"),
    act(7, "r0c0", "ADVANCE"),
    act(8, "r0c0", "FOSSILIZE"),
)


def plain_of(**settings: Any) -> dict[str, Any]:
    common = {
        "optim__schedule": "wsd",
        "optim__decay_share": 0.25,
        "optim__warmup_steps": 4,
        "trainer__steps": 32,
        "trainer__batch": 16,
        "checkpoint__every_ticks": 4,
        "checkpoint__keep": 8,
        "slots__incubation": "immediate",
        "telemetry__level": "full",
        "controller": GROWING,
    }
    return tiny_plain("gpt", **{**common, **settings})


def test_wsd_warms_up_stays_and_decays() -> None:
    config = OptimConfig(schedule=Schedule.WSD, warmup_steps=4, decay_share=0.25, final_lr_fraction=0.2)
    shape = [lr_shape(config, step, 40) for step in range(41)]
    assert shape[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(shape[4:31]) == {1.0}
    assert stable_until(config, 40) == 30
    assert shape[40] == pytest.approx(0.2)
    assert shape[35] == pytest.approx(0.6)
    assert all(a > b for a, b in itertools.pairwise(shape[30:]))
    assert lr_shape(config, 100, 40) == pytest.approx(0.2)
    assert stable_until(OptimConfig(), 40) is None
    assert stable_until(OptimConfig(schedule=Schedule.CONSTANT), 40) == 40


def test_a_run_that_goes_on_from_a_stable_part_is_the_longer_run(tmp_path: Path) -> None:
    first = prepare_run(tmp_path / "first", plain_of())
    assert live(first, 1) == [0]
    longer = prepare_run(tmp_path / "longer", plain_of(trainer__steps=48))
    assert live(longer, 1) == [0]
    on = prepare_run(tmp_path / "on", plain_of(trainer__steps=48, trainer__resume_from=str(first)))
    live(on, 1, Kill("backward", 14))  # before its first own checkpoint, and once more from there
    assert live(on, 1) == [0]
    wanted, found = final(longer), final(on)
    moved = [name for name, t in wanted["tensors"].items() if "rng" not in name and not t.equal(found["tensors"][name])]
    assert moved == []
    result = json.loads((on / "result.json").read_text())
    assert result["origin"]["step"] == 24
    assert result["sunk_flops"] + result["marginal_flops"] == result["flops"]
    assert result["flops"] == json.loads((longer / "result.json").read_text())["flops"]
    assert 0 < result["sunk_flops"] < json.loads((first / "result.json").read_text())["flops"]
    assert (first / "result.json").is_file()


@pytest.mark.parametrize(
    ("was", "now", "why"),
    [
        ({"optim__schedule": "cosine"}, {}, "goes down from the start"),
        ({}, {"trainer__resume_step": 32}, "there are 8, 16, 24"),
        ({}, {"trainer__steps": 24}, "set more than that"),
        ({"optim__decay_share": 1.0, "optim__warmup_steps": 0}, {}, "no checkpoint lies in its stable part"),
    ],
)
def test_what_cannot_be_gone_on_from_says_why(
    was: dict[str, Any], now: dict[str, Any], why: str, tmp_path: Path
) -> None:
    run = prepare_run(tmp_path / "run", plain_of(**was))
    for step in (8, 16, 24, 32):
        folder = run / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
    settings = {"trainer__steps": 48, "trainer__resume_from": str(run), **now}
    config = tiny_config("gpt", **settings)
    with pytest.raises(ConfigError, match=why):
        find_origin(config, None, None)  # type: ignore[arg-type]  # refused before anything is read


def test_a_folder_that_is_no_run_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainer\.resume_from = .* no config.yaml in it"):
        tiny_config("gpt", trainer__resume_from=str(tmp_path))
