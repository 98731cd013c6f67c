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


def test_wandb_has_every_decision_and_birth_that_the_events_have(
    wandb: WandbFile, grown: Finished, records: list[dict[str, Any]]
) -> None:
    def table(name: str) -> list[dict[str, Any]]:
        row = [row for row in wandb.history if f"tables/{name}/path" in row][-1]
        found = json.loads((offline_files(grown.run)[0].parent / "files" / row[f"tables/{name}/path"]).read_text())
        return [dict(zip(found["columns"], line, strict=True)) for line in found["data"]]

    judged = [r for r in records if r["kind"] in ("command", "refusal")]
    decisions = table("decisions")
    assert [(d["proposal"], d["step"], d["reason"]) for d in decisions] == [
        (r["payload"]["command"]["proposal"], r["step"], r["payload"]["reason"]) for r in judged
    ]
    stages = [r["payload"] for r in records if r["kind"] == "stage"]
    for row in decisions:
        moves = [s["target"] for s in stages if row["proposal"] and s["proposal"] == row["proposal"]]
        if moves and row["verdict"] == "applied":
            assert row["outcome"] == moves[-1]
    born = [r["payload"] for r in records if r["kind"] == "born"]
    assert [(b["slot"], b["parameters"]) for b in table("births")] == [(b["slot"], b["parameters"]) for b in born]
    assert born
    assert all(b["parameters"] > 0 and b["flops"] > 0 for b in born)
    saved = [r["payload"]["saved_step"] for r in records if r["kind"] == "checkpoint"]
    checkpoints = [a for a in wandb.artifacts if a["type"] == "checkpoint"]
    assert [a["metadata"]["step"] for a in checkpoints] == saved
    assert wandb.run["name"] == "demo, heuristic_varied, seed 1" or wandb.run["name"] == "demo, heuristic, seed 1"


def test_wandb_has_axes_config_growth_and_an_end(
    wandb: WandbFile, grown: Finished, records: list[dict[str, Any]], stages: list[StageChanged]
) -> None:
    assert wandb.metrics == {"train/step": "", "tick": "", "*": "train/step"}
    assert (wandb.ended, wandb.exit_code) == (True, 0)
    assert wandb.run["id"] == records[0]["run_id"]
    assert wandb.config["optim"]["lr"] == 0.02
    assert wandb.summary["status"] == "done"
    row = [row for row in wandb.history if "tables/growth/path" in row][-1]
    table = json.loads((offline_files(grown.run)[0].parent / "files" / row["tables/growth/path"]).read_text())
    assert table["data"] == [
        [e.step, e.tick, e.slot, e.source.name, e.target.name, e.cause, e.blueprint] for e in stages
    ]
