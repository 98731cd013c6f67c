"""The offline wandb run of a finished command, read back from its file: what the events hold, at the same steps."""

import json
from typing import Any

import pytest

from esper.leyline.events import StageChanged, TickDone
from esper.leyline.evidence import Reading
from tests.e2e.conftest import Finished
from tests.support.wandb_file import WandbFile, offline_files, read_wandb_file


@pytest.fixture(scope="module")
def wandb(grown: Finished) -> WandbFile:
    (path,) = offline_files(grown.run)
    return read_wandb_file(path)


def fresh(row: dict[str, Any], name: str, reading: Reading) -> None:
    """A measured reading stands in the row; another one does not."""
    if reading.is_measured:
        assert row[name] == reading.value, name
    else:
        assert name not in row, name


def test_wandb_has_what_the_events_have_at_the_same_steps(wandb: WandbFile, ticks: list[TickDone]) -> None:
    rows = [row for row in wandb.history if "lr" in row]
    assert [(row["train/step"], row["tick"]) for row in rows] == [(event.step, event.tick) for event in ticks]
    measured = 0
    for row, event in zip(rows, ticks, strict=True):
        fresh(row, "train/loss", event.train_loss)
        fresh(row, "train/accuracy", event.train_accuracy)
        fresh(row, "validation/loss", event.validation_loss)
        fresh(row, "validation/accuracy", event.validation_accuracy)
        assert (row["epoch"], row["lr"], row["parameters"]) == (event.epoch, event.lr, event.parameters)
        for line in event.slots:
            name = f"slots/{line.slot}"
            assert (row[f"{name}/stage"], row[f"{name}/alpha"]) == (line.stage.code, line.alpha)
            fresh(row, f"{name}/contribution", line.contribution)
            fresh(row, f"{name}/gradient_norm", line.gradient_norm)
            measured += line.contribution.is_measured
            if line.contribution.is_measured:
                assert row[f"{name}/contribution_se"] == line.contribution.se
    assert measured >= 4


def test_wandb_has_axes_config_growth_and_an_end(
    wandb: WandbFile, grown: Finished, records: list[dict[str, Any]], stages: list[StageChanged]
) -> None:
    assert wandb.metrics == {"train/step": "", "tick": "", "*": "train/step"}
    assert (wandb.ended, wandb.exit_code) == (True, 0)
    assert wandb.run["id"] == records[0]["run_id"]
    assert wandb.config["optim"]["lr"] == 0.02
    assert wandb.summary["status"] == "done"
    (row,) = [row for row in wandb.history if "growth/path" in row]
    table = json.loads((offline_files(grown.run)[0].parent / "files" / row["growth/path"]).read_text())
    assert table["data"] == [
        [e.step, e.tick, e.slot, e.source.name, e.target.name, e.cause, e.blueprint] for e in stages
    ]
