"""A target of the held out parts that is none is told at the start, by sample and part, on every rank alike."""

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.leyline.errors import ConfigError, DataError
from esper.run.start.held_out import check_held_out
from esper.tolaria.data import CustomDataConfig, load_data
from esper.tolaria.ranks.config import ControlConfig, WorldConfig
from esper.tolaria.ranks.world import World
from esper.tolaria.tasks import TASKS, ClassificationConfig
from esper.tolaria.tasks.bind import bind
from tests.support.dist import ROOT
from tests.support.killed_runs import live, prepare_run
from tests.support.tiny import custom_host, tiny_plain

PARTS = ("train", "validation", "probe", "test")
BAD = {  # the task, the target of sample 77 of one part, its weight, and what is said
    "label": ("classification", 3, 1.0, "a target is 3, expected 0 to 2; correct it, or classes= of the data"),
    "nan": ("regression", float("nan"), 1.0, "a target is nan, expected finite numbers; correct it, or leave it out"),
    "weight": ("classification", 1, float("inf"), "a sample_weight is not finite; correct it"),
}


class Samples:
    """200 samples; number 77 is bad where the part is."""

    def __init__(self, bad: str, here: bool) -> None:
        self.task, *self.odd, _ = BAD[bad]
        self.here = here

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        y, weight = self.odd if self.here and index == 77 else (index % 3, 1.0)
        label = torch.tensor(y, dtype=torch.int64 if self.task == "classification" else torch.float32)
        return {"x": torch.ones(4) * index, "labels": label, "sample_weight": torch.tensor(weight)}


def data(bad: str, part: str) -> esper.Data:
    classes = 3 if BAD[bad][0] == "classification" else 1
    return esper.Data(classes=classes, **{name: Samples(bad, name == part) for name in PARTS})


class Net(nn.Module):
    """Takes its input by name, as the samples have it."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).relu())


def build(input_shape: tuple[int, ...], classes: int) -> nn.Module:
    return Net(classes)


def plain_data(bad: str, part: str) -> Any:
    return CustomDataConfig(path=f"{__name__}:data", options={"bad": bad, "part": part})


@pytest.mark.parametrize(("bad", "part"), [("label", "validation"), ("nan", "probe"), ("weight", "test")])
def test_each_kind_in_each_part(bad: str, part: str) -> None:
    task, *_, words = BAD[bad]
    world = World(WorldConfig(), ControlConfig(), alone=True)
    bundle = bind(load_data(plain_data(bad, part)), TASKS[task][0]())
    with pytest.raises(DataError) as caught:
        check_held_out(bundle, world)
    told = str(caught.value).replace(f"task {task}: ", "")
    assert told == f"data: sample 77 of the part {part}: {words}"
    check_held_out(bind(load_data(plain_data(bad, "train")), TASKS[task][0]()), world)


def test_a_run_ends_before_its_first_step(tmp_path: Path) -> None:
    """Rank 0 alone reads that sample."""
    plain = tiny_plain(
        data=plain_data("label", "probe"),
        task=ClassificationConfig(),
        host=custom_host(f"{__name__}:build", {"r0c0": "first"}),
        trainer__steps=4,
    )
    run_dir = prepare_run(tmp_path / "run", plain)
    codes = live(run_dir, 2)
    status = json.loads((run_dir / "STATUS.json").read_text())
    assert codes == [DataError.exit_code] * 2, status
    assert status["step"] == 0
    assert "sample 77 of the part probe: a target is 3, expected 0 to 2" in status["message"]


def test_the_demo_gives_no_command_that_would_fail_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = spec_from_file_location("demo_script", ROOT / "launch" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    demo = sys.modules["demo_script"] = module_from_spec(spec)
    spec.loader.exec_module(demo)
    assert demo.main(["trainer.steps=-3", f"run.dir={tmp_path / 'demo'}"]) == ConfigError.exit_code
    told = capfd.readouterr().err
    assert "trainer.steps = -3" in told
    assert "to finish the demo" not in told
