"""The workspace for wandb: what would be sent to its server names only what a run really logs."""

import json
import re

import pytest

from esper import cli
from esper.karn.wandb_workspace import SECTIONS, STEP, make_workspace, specification
from esper.leyline.stages import Stage
from esper.nissa.console import describe_event
from esper.nissa.wandb_rows import tick_row
from esper.nissa.wandb_tables import COLUMNS, Story
from tests.nissa.samples import run_started, tick_done


@pytest.fixture(scope="module")
def sent():
    return specification(make_workspace("us", "growth", "esper"))


def panels_of(sent):
    return {
        section["name"]: [(panel["viewType"], panel["config"]) for panel in section["panels"]]
        for section in sent["spec"]["section"]["panelBankConfig"]["sections"]
    }


def test_its_sections_and_every_panel_are_in_what_would_be_sent(sent):
    assert (sent["entity"], sent["project"]) == ("us", "growth")
    assert list(panels_of(sent)) == ["Growth", "Evidence", "Health", "Cost", "Sweep comparison"]
    assert {name: len(panels) for name, panels in panels_of(sent).items()} == {
        name: len(section) for name, section in SECTIONS.items()
    }


def test_every_metric_and_table_that_it_shows_is_logged(sent):
    story = Story(describe_event)
    for event in (run_started(), tick_done(2, Stage.BLENDING)):
        story.take(event)
    logged = set(tick_row(tick_done(2, Stage.BLENDING))) | {f"counts/{name}" for name in story.counts}
    logged |= {"train/accuracy", "validation/accuracy", "validation/loss"}  # stale or absent in the sample
    summed = set(story.summary())
    shown = 0
    for section in SECTIONS.values():
        for panel in section:
            if panel.table is not None:
                assert panel.table in COLUMNS
            elif panel.regex is not None:
                assert any(re.fullmatch(panel.regex, name) for name in logged), panel.regex
            else:
                assert set(panel.metrics) <= (logged if panel.kind == "line" else summed), panel.title
            shown += 1
    text = json.dumps(sent)
    assert all(name in text for section in SECTIONS.values() for panel in section for name in panel.metrics)
    assert all(panel.regex in text for section in SECTIONS.values() for panel in section if panel.regex)
    assert shown == sum(map(len, panels_of(sent).values()))


def test_lines_stand_over_optimizer_steps_and_sweeps_are_grouped_by_controller(sent):
    every = [panel for panels in panels_of(sent).values() for panel in panels]
    lines = [config for kind, config in every if kind == "Run History Line Plot"]
    assert {config["xAxis"] for config in lines} == {STEP}
    grouped = [config for config in lines if config.get("groupBy")]
    assert len(grouped) == 2
    assert {config["groupBy"] for config in grouped} == {"controller.value.kind"}, "as wandb spells controller.kind"


def test_the_command_prints_it_without_a_server(capsys, monkeypatch):
    monkeypatch.delenv("WANDB_ENTITY", raising=False)
    assert cli.main(["wandb-workspace", "--spec"]) == 78
    assert "--entity: name the user or team" in capsys.readouterr().err
    assert cli.main(["wandb-workspace", "--spec", "--entity", "us", "--project", "growth"]) == 0
    assert json.loads(capsys.readouterr().out)["project"] == "growth"
