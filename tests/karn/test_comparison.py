"""Tables and verdicts on records whose answer is known."""

import math

import numpy as np
import pytest

from esper.karn.comparison import Metric, compare, equal_flops
from esper.karn.page import write_page
from esper.karn.table import cells, comparison_table, verdict_lines
from tests.karn.records import record

SEEDS = range(100, 110)


def arms(**gains: float) -> dict:
    """Ten seeds per arm: shared noise of 5 points, own noise of 0.1, and a gain in accuracy."""
    random = np.random.default_rng(7)
    shared = random.normal(0, 0.05, len(SEEDS))
    return {
        arm: {
            seed: record(
                [(10, 2.0), (20 * (1 + index), 1.0 - gain)],
                accuracy=0.5 + gain + shared[i] + random.normal(0, 0.001), test_loss=1 - gain,
            )
            for i, seed in enumerate(SEEDS)
        }
        for index, (arm, gain) in enumerate(gains.items())
    }  # fmt: skip


def verdicts(found) -> dict:
    return {verdict.claim: verdict.holds for verdict in found.verdicts}


def test_a_small_effect_is_found_under_noise_that_the_seeds_share():
    runs = arms(none=0.0, random=0.0, schedule=0.009, immediate=0.01, heuristic=0.01, final=0.01, mid=0.002)
    found = compare("x", runs, Metric.ACCURACY, sizes=["mid"], subject="heuristic", flops_share=0.9)
    assert found.informative is True
    said = verdicts(found)
    assert said["heuristic beats none by more than 2 SE"] is True
    assert said["heuristic beats random by more than 2 SE"] is True
    assert said["heuristic is not below schedule by more than 1 SE"] is True
    row = found.row("heuristic")
    assert row.against["none"].value == pytest.approx(0.01, abs=0.002)
    assert row.score.se > 10 * row.against["none"].se
    assert 0.5 <= row.beats["none"].value <= 1.0


def test_no_effect_is_called_none_and_a_worse_arm_worse():
    runs = arms(none=0.0, random=0.0, schedule=0.02, immediate=0.0, heuristic=0.0, final=0.0, mid=0.0)
    found = compare("x", runs, Metric.ACCURACY, sizes=["mid"], subject="heuristic", flops_share=0.75)
    assert found.informative is False
    said = verdicts(found)
    assert said["heuristic beats none by more than 2 SE"] is False
    assert said["heuristic is not below schedule by more than 1 SE"] is False
    assert any("UNINFORMATIVE" in line[1] for line in verdict_lines(found))


def test_identical_runs_differ_by_nothing():
    base = arms(none=0.0)["none"]
    found = compare(
        "x", {"none": base, "heuristic": dict(base)}, Metric.ACCURACY, sizes=[], subject="heuristic", flops_share=1.0
    )
    assert found.row("heuristic").against["none"].value == 0.0
    assert verdicts(found)["heuristic beats none by more than 2 SE"] is False
    assert found.informative is None  # no run of final


def test_flops_are_compared_seed_by_seed():
    runs = {
        "none": {1: record([(5, 3.0), (10, 2.0)])},
        "final": {1: record([(10, 3.0), (100, 1.0)])},
        "heuristic": {1: record([(10, 3.0), (40, 1.0), (80, 0.9)])},
        "mid": {1: record([(10, 3.0), (80, 1.1)])},
    }
    assert equal_flops(runs) == {1: 80}
    found = compare("x", runs, Metric.LOSS, sizes=["mid"], subject="heuristic", flops_share=0.5)
    assert found.row("heuristic").to_final == pytest.approx(0.4)
    assert found.row("mid").to_final == math.inf
    assert found.row("mid").reached == 0
    assert found.row("none").equal_loss is None
    assert found.row("final").equal_loss.value == pytest.approx(3.0 - 2.0 * 70 / 90)
    assert cells(found.row("mid"))[7] == "never (0/1)"
    assert verdicts(found)["heuristic reaches final's loss with at most 0.5 of its FLOPs"] is True


def test_the_page_holds_every_number_and_needs_nothing_else(tmp_path):
    pytest.importorskip("matplotlib")
    runs = arms(none=0.0, heuristic=0.01, final=0.01)
    stages = [(1, "r0c0", "GERMINATED"), (3, "r0c0", "TRAINING"), (6, "r0c0", "PRUNED")]
    runs["heuristic"][100] = record([(10, 2.0), (30, 0.9)], accuracy=0.6, stages=stages)
    found = compare("demo & more", runs, Metric.ACCURACY, sizes=[], subject="heuristic", flops_share=0.75)
    path = tmp_path / "compare.html"
    write_page(found, runs, path, command="esper compare demo", where={"none/100": "RUN"})
    text = path.read_text()
    for row in found.rows:
        assert all(cell.replace("&", "&amp;") in text for cell in cells(row))
    assert text.count("<svg") == 3
    assert "demo &amp; more" in text
    for outside in ("<script", "<link", "http-equiv", 'src="http', "@import"):
        assert outside not in text
    assert comparison_table(found) is not None
