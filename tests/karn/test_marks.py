"""Readings at FLOP marks against figures worked out by hand."""

import pytest

from esper.karn.marks import Crossing, MarkClaim, Marks, reading_at, report_marks
from tests.karn.records import record

RUNS = {
    "host": {seed: record([(100, 1.0)]) for seed in (1, 2)},
    "grown": {1: record([(0, 3.0), (100, 1.0)]), 2: record([(0, 3.0), (100, 1.2)])},
    "small": {1: record([(0, 2.0), (100, 1.5)]), 2: record([(0, 2.0), (100, 1.7)])},
    "large": {1: record([(0, 4.0), (200, 0.0)]), 2: record([(0, 4.0), (200, 0.0)])},
}


def test_a_reading_is_linear_between_ticks_and_absent_outside() -> None:
    run = record([(10, 4.0), (20, 2.0), (40, 1.0)])
    assert [reading_at(run, flops) for flops in (10, 15, 30, 40)] == [4.0, 3.0, 1.5, 1.0]
    assert reading_at(run, 9) is None
    assert reading_at(run, 40.5) == 1.0, "lengths are whole steps"
    assert reading_at(run, 42) is None


def test_arms_are_put_beside_the_subject_seed_by_seed() -> None:
    report = report_marks(
        RUNS,
        of="host",
        at=[0.5, 1.0],
        main=1.0,
        subject="grown",
        sizes=["small", "large"],
        apart=[],
        claims={"it": MarkClaim(arm="grown", than="small")},
    )
    rows = {(row.arm, row.mark): row for row in report.rows}
    assert rows["grown", 0.5].loss.value == pytest.approx(2.05)
    assert rows["small", 1.0].behind is not None
    assert rows["small", 1.0].behind.value == pytest.approx(0.5)
    assert rows["small", 1.0].subject_better is not None
    assert rows["small", 1.0].subject_better.value == 1.0
    assert rows["grown", 1.0].behind is None
    assert report.sunk == 100
    # at 0.5: least is 1.75 and 1.85; at 1.0: 1.5 and 1.7
    assert report.regret["grown"].value == pytest.approx(((2.0 - 1.75) + (1.0 - 1.5) + (2.1 - 1.85) + (1.2 - 1.7)) / 4)
    assert report.regret["small"].value == pytest.approx(0.0)
    assert report.crossings["large"] == Crossing(pytest.approx(1 / 60), "grown")
    crossing = report.crossings["small"]  # 2 - m / 2 and 2 - 0.3 m against 3 - 2 m and 3 - 1.8 m: from 2 / 3 on
    assert crossing == Crossing(pytest.approx(2 / 3, abs=1 / 60), "grown")
    assert report.verdicts["it"].difference is not None
    assert report.verdicts["it"].difference.value == pytest.approx(-0.5)


def test_a_run_that_ends_before_a_mark_is_not_read_there() -> None:
    runs = {**RUNS, "short": {1: record([(0, 3.0), (50, 1.0)])}}
    marks = Marks(runs, "host")
    assert marks.row("short", 1.0, "grown", []) is None
    assert marks.at("short", 0.5) == {1: 1.0}
    assert marks.difference("short", "grown", 0.5).n == 1


def test_without_fixed_sizes_there_is_no_regret() -> None:
    told = {"of": "host", "at": [1.0], "main": 1.0, "subject": "grown", "apart": [], "claims": {}}
    assert not report_marks(RUNS, sizes=[], **told).regret
    assert set(report_marks(RUNS, sizes=["small"], **told).regret) == {"grown", "small", "large"}
