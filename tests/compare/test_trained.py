"""Arms that begin with a trained host: derived, searched, run and read at marks, in a small planted comparison."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from esper.compare.arms import CompareConfig, derive, load_compare
from esper.compare.lengths import DataCache
from esper.compare.marked import run_marked
from esper.compare.marked_table import marked_markdown
from esper.compare.search import losses_of, search_rates, trial_name, trials_of, widened, with_rates
from esper.karn.rows import Runs
from esper.leyline.errors import ConfigError
from tests.compare.test_arms import result
from tests.karn.records import record

PLANTED = """
base: [data=digits_phases, data.phase=new, data.validation=20, data.probe=20, data.test=20, gates=observe, world=cpu,
       world.nproc_per_node=1, controller=none, trainer.batch=32, control.every=4, trainer.ema=0.9,
       trainer.ema_validate=true, optim.schedule=constant, checkpoint.keep=1, telemetry.wandb.mode=disabled]
seeds: [1]
metric: loss
subject: replay
flops_share: null
margin: null
search: {values: [0.0001, 0.02], seeds: [9], widen: 0}
marks:
  of: trained
  at: [0.5, 1.0]
  main: 0.5
  apart: [loss_old, loss_new]
  claims: {it: {arm: replay, than: scratch}}
arms:
  trained: {search: false, overrides: [data.phase=old, trainer.steps=60, optim.lr=0.02]}
  replay: {resume_from: trained, flops: trained}
  scratch: {flops: trained, size: true, search: false, overrides: [optim.lr=0.0001]}
"""


@pytest.fixture
def planted(tmp_path: Path) -> CompareConfig:
    path = tmp_path / "planted.yaml"
    path.write_text(PLANTED)
    return load_compare(str(path), [])


def test_a_planted_comparison_finds_the_rate_and_the_better_arm(planted: CompareConfig, tmp_path: Path) -> None:
    """A rate at which nothing learns is planted; a trained host at the other one is better than a host that is new."""
    said: list[str] = []
    report = run_marked("planted", planted, tmp_path / "out", parallel=1, report_only=False, say=said.append)
    assert report.found is not None
    assert report.found.rates == {"replay": 0.02}
    assert report.seeds == (1, 1)
    losses = report.found.losses["replay"]
    assert losses[0.02] < losses[0.0001]
    rows = {(row.arm, row.mark): row for row in report.marks.rows}
    assert set(rows) == {(arm, mark) for arm in ("replay", "scratch") for mark in (0.5, 1.0)}
    assert rows["replay", 1.0].loss.value < rows["scratch", 1.0].loss.value - 0.3
    for row in rows.values():
        assert row.loss.value == pytest.approx((row.apart["loss_old"].value + row.apart["loss_new"].value) / 2)
    difference = report.marks.verdicts["it"].difference
    assert difference is not None
    assert difference.value < 0
    assert "| replay | 1 |" in marked_markdown(report)
    runs = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*/result.json")}
    again = run_marked("planted", planted, tmp_path / "out", parallel=1, report_only=False, say=said.append)
    assert again.marks == report.marks
    assert runs == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*/result.json")}


def test_an_arm_begins_with_the_network_of_another_and_spends_a_share(planted: CompareConfig, tmp_path: Path) -> None:
    run, data = result(tmp_path / "run", 10**10, {}), DataCache()
    config, _ = derive(planted, "replay", 1, {"trained": run}, data)
    assert config.host.weights == str(run)
    planted.arms["replay"].share = 0.25
    quarter, _ = derive(planted, "replay", 1, {"trained": run}, data)
    assert quarter.trainer.steps == pytest.approx(config.trainer.steps / 4, abs=1)
    assert planted.arms["replay"].waits_for == {"trained"}


def test_trials_are_the_same_for_every_arm_and_end_at_the_main_mark(planted: CompareConfig) -> None:
    planted.arms["scratch"].search = True
    trials = trials_of(planted, [0.01, 0.1])
    assert set(trials.arms) == {"trained", *(trial_name(arm, r) for arm in ("replay", "scratch") for r in (0.01, 0.1))}
    assert {arm.share for name, arm in trials.arms.items() if name != "trained"} == {0.5}
    assert trials.seeds == [9]
    assert with_rates(planted, {"replay": 0.03}).arms["replay"].overrides == ["optim.lr=0.03"]


def test_all_arms_are_widened_where_the_best_of_one_lies_at_an_edge(planted: CompareConfig, tmp_path: Path) -> None:
    assert widened([1.0, 2.0, 4.0], {"a": {1.0: 3.0, 2.0: 1.0, 4.0: 2.0}}) == [1.0, 2.0, 4.0]
    both = {"a": {1.0: 1.0, 2.0: 2.0, 4.0: 3.0}, "b": {1.0: 3.0, 2.0: 2.0, 4.0: 1.0}}
    assert widened([1.0, 2.0, 4.0], both) == [0.5, 1.0, 2.0, 4.0, 8.0]
    planted.arms["scratch"].search = True
    assert planted.search is not None
    planted.search.values, planted.search.widen = [1.0, 2.0], 3
    tried: list[Sequence[str]] = []

    def run(trials: CompareConfig, _: Path) -> Runs:
        """The best rate of one arm is 8, of the other 1."""
        tried.append(list(trials.arms))
        runs = {"trained": {9: record([(100, 1.0)])}}
        for name in trials.arms:
            arm, _, rate = name.partition("@")
            if rate:
                loss = abs(float(rate) - {"replay": 8.0, "scratch": 1.0}[arm])
                runs[name] = {9: record([(10, loss), (50, loss)])}
        return runs

    found = search_rates(planted, tmp_path, run, lambda text: None)
    assert found.rates == {"replay": 8.0, "scratch": 1.0}
    assert {len(of) for of in found.losses.values()} == {len(found.losses["replay"])}
    assert sorted(found.losses["replay"]) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]
    assert not found.edges
    assert losses_of(planted, [3.0], {"trained": {}})["replay"] == {3.0: float("inf")}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ("search.seeds=[1]", "others than those of the comparison"),
        ("marks.main=0.7", "must be one of the marks"),
        ("marks.of=nobody", "nobody, no arm"),
        ("search.values=[2,1]", "each larger than the one before"),
        ("arms.replay.resume_from=replay", "waits for itself"),
        ("margin=0.1", "null with marks"),
        ("metric=accuracy", "loss with marks"),
    ],
)
def test_wrong_settings_are_refused_by_name(planted: CompareConfig, tmp_path: Path, change: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_compare(str(tmp_path / "planted.yaml"), [change])
