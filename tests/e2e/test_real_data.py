"""CIFAR-10 and text from files, through the whole command; needs the folder that ESPER_DATA names."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from esper.nissa.reading import read_events
from tests.e2e.conftest import Start
from tests.support.commands import NO_WANDB, TRAIN

pytestmark = pytest.mark.data

SHORT = ("trainer.steps=30", "control.every=5", "gates.evidence=observe", "seed=1", NO_WANDB, "run.dir=run")
BIRTH = "{{tick: 1, slot: r0c0, op: GERMINATE, blueprint: {}}}"
ACTIONS = f"controller.actions=[{BIRTH}, {{{{tick: 3, slot: r0c0, op: ADVANCE}}}}]"


@pytest.fixture
def folder() -> str:
    if not os.environ.get("ESPER_DATA"):
        pytest.skip("ESPER_DATA is not set; it names a folder with cifar10/ and wikitext2/")
    return os.environ["ESPER_DATA"]


def trained(start: Start, run: Path, *overrides: str, folder: str) -> dict[str, Any]:
    """Trains on two ranks while a seed germinates; returns result.json."""
    command = start(TRAIN, *overrides, *SHORT, "controller=schedule", "slots.incubation=shadow", ESPER_DATA=folder)
    assert command.end() == 0, command.told()
    records = read_events(run / "events.jsonl")
    losses = [record["payload"]["train_loss"]["value"] for record in records if record["kind"] == "tick"]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    stages = [record["payload"]["target"] for record in records if record["kind"] == "stage"]
    assert stages == ["GERMINATED", "TRAINING"]
    result: dict[str, Any] = json.loads((run / "result.json").read_text())
    return result


def test_cifar10_below_the_data_folder(start: Start, tmp_path: Path, folder: str) -> None:
    small = ("data.max_train=1500", "data.validation=300", "data.probe=384")
    result = trained(
        start, tmp_path / "run", "data=cifar10", *small, "optim.lr=0.01", ACTIONS.format("conv_small"), folder=folder
    )
    assert result["data"]["sizes"] == {"train": 1500, "validation": 300, "probe": 384, "test": 10_000}
    assert result["test_accuracy"]["n"] == 10_000
    assert 0.05 < result["test_accuracy"]["value"] < 0.6


@pytest.mark.slow  # text from files goes through whole commands in tests/faults/test_bad_day.py, too
def test_text_below_the_data_folder(start: Start, tmp_path: Path, folder: str) -> None:
    small = ("data.block=32", "host.block=32", "data.max_bytes=200000", "data.validation=64", "data.probe=384")
    result = trained(
        start,
        tmp_path / "run",
        "host=gpt",
        "data=text",
        "trainer=language",
        *small,
        ACTIONS.format("mlp_small"),
        folder=folder,
    )
    assert result["data"]["kind"] == "text"
    assert 0.0 < result["test_loss"]["value"] < 5.6, "below the entropy of 256 equal bytes"
