"""Tables and verdicts on records whose answer is known."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from esper.karn.comparison import compare
from esper.karn.page import write_page
from esper.karn.rows import Metric, equal_flops, metric_of_runs
from esper.karn.stats import Estimate
from esper.karn.table import comparison_table, format_interval, format_number, markdown, table_parts, verdict_lines
from esper.leyline.errors import ConfigError, RunDirError
from esper.leyline.events.task import MetricInfo, TaskInfo
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
                accuracy=0.5 + gain + shared[i] + random.normal(0, 0.001),
                test_loss=1 - gain,
                parameters=60 if arm.startswith("mid") else 100,
            )
            for i, seed in enumerate(SEEDS)
        }
        for index, (arm, gain) in enumerate(gains.items())
    }


def verdicts(found) -> dict:
    return {verdict.claim: verdict.holds for verdict in found.verdicts}


def figures(found) -> dict:
    return {verdict.claim: verdict.figure for verdict in found.verdicts}


def scored(*accuracies: float, parameters: int = 100) -> dict:
    """One run per accuracy, seeds from 1."""
    return {
        seed: record([(10, 2.0), (20, 1.0)], accuracy=value, parameters=parameters)
        for seed, value in enumerate(accuracies, start=1)
    }


def asked(runs: dict, *, sizes=("mid",), subject="heuristic", share=0.75, metric=Metric.ACCURACY, notes=()):
    return compare("x", runs, metric, sizes=sizes, subject=subject, flops_share=share, margin=0.01, notes=notes)


def cell(found, arm: str, head: str) -> str:
    """The cell of an arm under the one head that contains ``head``."""
    hits = [
        row[part.heads.index(title)]
        for part in table_parts(found)
        for title in part.heads
        if head in title
        for row in part.rows
        if row[0] == arm
    ]
    (hit,) = hits
    return hit


def printed(found, width: int) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(comparison_table(found))
    return text.getvalue()


def test_a_small_effect_is_found_under_noise_that_the_seeds_share():
    runs = arms(none=0.0, random=0.0, schedule=0.009, immediate=0.01, heuristic=0.01, final=0.01, mid=0.002)
    found = compare("x", runs, Metric.ACCURACY, sizes=["mid"], subject="heuristic", flops_share=0.9, margin=0.01)
    assert found.informative is True
    said = verdicts(found)
    assert said["heuristic beats none"] is True
    assert said["heuristic beats random"] is True
    assert said["heuristic is not behind schedule by 1.00 points"] is True
    row = found.row("heuristic")
    assert row.against["none"].value == pytest.approx(0.01, abs=0.002)
    assert row.score.se > 10 * row.against["none"].se
    assert 0.5 <= row.beats["none"].value <= 1.0


def test_no_effect_is_called_none_and_a_worse_arm_worse():
    runs = arms(none=0.0, random=0.0, schedule=0.02, immediate=0.0, heuristic=0.0, final=0.0, mid=0.0)
    found = compare("x", runs, Metric.ACCURACY, sizes=["mid"], subject="heuristic", flops_share=0.75, margin=0.01)
    said = verdicts(found)
    assert found.informative is None  # neither shown nor refuted
    assert said["heuristic beats none"] is None
    assert said["heuristic is not behind schedule by 1.00 points"] is False
    worse = compare(
        "x",
        arms(none=0.01, final=0.0, mid=0.0),
        Metric.ACCURACY,
        sizes=["mid"],
        subject="heuristic",
        flops_share=0.75,
        margin=0.01,
    )
    assert worse.informative is False
    assert verdict_lines(worse)[0][:2] == ("NO", "UNINFORMATIVE: capacity does not matter here, whatever the rows say")


def test_identical_runs_differ_by_nothing():
    base = arms(none=0.0)["none"]
    found = asked({"none": base, "heuristic": dict(base)}, sizes=[])
    assert found.row("heuristic").against["none"].value == 0.0
    assert verdicts(found)["heuristic beats none"] is None
    assert found.informative is None  # no run of final


def test_flops_are_compared_seed_by_seed():
    runs = {
        "none": {1: record([(5, 3.0), (10, 2.0)])},
        "final": {1: record([(10, 3.0), (100, 1.0)])},
        "heuristic": {1: record([(10, 3.0), (40, 1.0), (80, 0.9)])},
        "mid": {1: record([(10, 3.0), (80, 1.1)])},
    }
    assert equal_flops(runs) == {1: 80}
    found = compare("x", runs, Metric.LOSS, sizes=["mid"], subject="heuristic", flops_share=0.5, margin=0.01)
    assert found.row("heuristic").to_final == pytest.approx(0.4)
    assert found.row("mid").to_final == math.inf
    assert found.row("mid").reached == 0
    assert found.row("none").equal_loss is None
    assert found.row("final").equal_loss.value == pytest.approx(3.0 - 2.0 * 70 / 90)
    assert cell(found, "mid", "to final") == "– (0/1)"
    assert cell(found, "heuristic", "to final") == "0.40 (1/1)"
    claim = "heuristic reaches final's loss with at most 0.5 of its FLOPs"
    assert verdicts(found)[claim] is None  # one seed shows nothing
    assert figures(found)[claim] == "median 0.40; within 0.5 on 1 of 1 seeds, ever on 1 of 1; p = 1.000"


def test_terminal_and_page_show_every_number_that_was_asked_for():
    found = asked(arms(none=0.0, random=0.0, schedule=0.01, heuristic=0.01, final=0.01, mid=0.0))
    row = found.row("heuristic")
    for head, estimate, places, scale in (
        ("final %", row.final_accuracy, 2, 100),
        ("best %", row.best_accuracy, 2, 100),
        ("test\naccuracy", row.test_accuracy, 2, 100),
        ("test loss", row.test_loss, 4, 1),
        ("final loss", row.final_loss, 4, 1),
        ("best loss", row.best_loss, 4, 1),
        ("loss at", row.equal_loss, 4, 1),
        ("parameters", row.parameters, 0, 1),
    ):
        assert isinstance(estimate, Estimate)
        assert cell(found, "heuristic", head) == format_number(estimate, places, scale)
        assert "±" in cell(found, "heuristic", head)
    assert row.flops.value == 80
    assert cell(found, "heuristic", "IQM") == format_interval(row.iqm, 2, 100)
    for other in ("none", "random", "schedule"):
        assert cell(found, "heuristic", f"− {other}\n(points)") == format_number(row.against[other], 2, 100, sign="+")
        assert cell(found, "heuristic", f"P(> {other})") == format_interval(row.beats[other], 2)
        assert "[" in cell(found, "heuristic", f"P(> {other})")
    text = printed(found, 130)
    assert all(value in text for part in table_parts(found) for line in part.rows for value in line)


def test_differences_of_loss_are_nats_and_its_interquartile_mean_a_loss():
    runs = arms(none=0.0, heuristic=0.25)
    found = asked(runs, metric=Metric.LOSS)
    assert cell(found, "heuristic", "− none\n(nats, + better)").startswith("+0.2500")
    assert cell(found, "heuristic", "IQM of\ntest loss") == "0.7500 [0.7500, 0.7500]"
    assert not any("validation: " in head for part in table_parts(found) for head in part.heads)


def test_a_metric_of_the_tasks_own_is_told_in_its_unit_and_direction():
    mae = MetricInfo(name="mae", unit="kWh", higher=False)
    task = TaskInfo(
        name="regression", unit="kWh^2", objective="validation_loss", higher=False, graded=False, metrics=(mae,)
    )

    def runs_of(*values: float) -> dict:
        told = {"task": task, "accuracy": math.nan}
        return {s: record([(10, 2.0), (20, 1.0)], metrics={"mae": v}, **told) for s, v in enumerate(values)}

    runs = {"none": runs_of(3.0, 3.1, 3.2), "heuristic": runs_of(2.0, 2.2, 2.1), "schedule": runs_of(2.0, 2.1, 2.1)}
    metric = metric_of_runs("mae", runs)
    found = asked(runs, sizes=[], metric=metric)
    assert cell(found, "heuristic", "− none\n(kWh, + better)").startswith("+1.0000 ±")
    assert cell(found, "heuristic", "test\nmae kWh").startswith("2.1000 ±")
    assert cell(found, "heuristic", "IQM of\ntest mae kWh") == format_interval(found.row("heuristic").iqm, 4, -1.0)
    assert verdicts(found)["heuristic beats none"] is True
    assert verdicts(found)["heuristic is not behind schedule by 0.0100 kWh"] is None
    text = markdown(found)
    assert "differences in kWh of test mae" in text
    assert "Validation loss in kWh^2 per sample" in text
    assert not any(word in text for word in ("accuracy", "nats", "nan"))
    with pytest.raises(ConfigError, match=r"compare\.metric = 'accuracy': the task regression has no such m"):
        metric_of_runs("accuracy", runs)
    other = {**runs, "final": {1: record([(10, 2.0)])}}
    with pytest.raises(ConfigError, match="arms learn different tasks"):
        metric_of_runs("loss", other)


def test_each_table_fits_a_terminal():
    random = np.random.default_rng(0)
    names = ("none", "heuristic", "schedule", "immediate", "random", "final", "none_long", "mid_large")
    runs = {
        arm: {
            s: record(
                [(10**12, 2.5), (int(2e12 * random.uniform(1, 1.2)), 1 + random.uniform())],
                accuracy=random.uniform(0.5, 0.6),
                test_loss=random.uniform(1, 2),
                parameters=int(20000 * random.uniform(1, 1.5)),
            )
            for s in SEEDS
        }
        for arm in names
    }
    for metric in (Metric.ACCURACY, Metric.LOSS):
        lines = printed(asked(runs, sizes=["mid_large"], metric=metric), 300).splitlines()
        cut = next(i for i, line in enumerate(lines) if " beats " in line)
        assert max(len(line.rstrip()) for line in lines[:cut]) <= 130


def test_seeds_that_all_differ_by_the_same_leave_a_claim_open():
    runs = {"none": scored(0.500, 0.520), "heuristic": scored(0.504, 0.524), "schedule": scored(0.504, 0.524)}
    runs["random"] = scored(0.504, 0.524)
    found = asked(runs)
    assert verdicts(found)["heuristic beats none"] is None
    assert figures(found)["heuristic beats none"] == (
        "all 2 seeds differ by the same, +0.40 points: more seeds are needed"
    )
    for claim in ("heuristic beats random", "heuristic is not behind schedule by 1.00 points"):
        assert verdicts(found)[claim] is None
        assert figures(found)[claim] == "all 2 seeds differ by nothing: more seeds are needed"
    assert "inf" not in printed(found, 200).replace("informative", "")


def test_a_figure_is_told_in_the_unit_of_its_metric():
    runs = {"none": scored(0.50, 0.50), "heuristic": scored(0.51, 0.53)}
    figure = figures(asked(runs))["heuristic beats none"]
    assert figure == "+2.00 points, 95 % interval -10.71 to +14.71 over 2 seeds; p = 0.295"


def test_a_size_that_is_no_smaller_than_final_is_not_asked():
    runs = {
        "none": scored(0.50, 0.51, 0.52, 0.53),
        "final": scored(0.60, 0.62, 0.61, 0.64, parameters=11_762),
        "mid_small": scored(0.55, 0.56, 0.57, 0.58, parameters=8_786),
        "mid_large": scored(0.65, 0.66, 0.67, 0.68, parameters=18_130),
    }
    found = asked(runs, sizes=["mid_small", "mid_large"])
    assert found.informative is True
    assert "final beats mid_large" not in verdicts(found)
    note = "mid_large is no smaller than final here (18,130 against 11,762 parameters): not asked"
    assert found.notes == (note,)
    alone = asked({arm: runs[arm] for arm in ("none", "final", "mid_large")}, sizes=["mid_large"])
    assert alone.informative is None
    assert verdicts(alone)["final beats none"] is True
    assert asked(runs, sizes=[]).informative is None
    swapped = {**runs, "none": runs["final"], "final": runs["none"]}
    assert asked(swapped, sizes=[]).informative is False  # one refuted claim decides
    assert asked({**runs, "mid_small": {}}, sizes=["mid_small"]).informative is None  # smaller, but without a run


def test_sizes_are_compared_on_the_seeds_that_both_have():
    runs = {"none": scored(0.50, 0.51), "final": scored(0.6, 0.62, parameters=100), "mid": scored(0.5, 0.5)}
    runs["mid"] = {1: record([(10, 1.0)], parameters=90), 2: record([(10, 1.0)], parameters=100)}
    runs["final"][3] = record([(10, 1.0)], parameters=10)
    assert asked(runs).notes == ("loss at equal FLOPs is over 2 of 3 seeds: those of every arm but none",)


def reaching(*spent: int | None) -> dict:
    """`final` spends 100 to a loss of 1 on each seed, the arm as much as is given, or never gets there."""
    return {
        "final": {s: record([(10, 3.0), (100, 1.0)]) for s in range(len(spent))},
        "heuristic": {
            s: record([(10, 3.0), (200, 1.5)] if flops is None else [(10, 3.0), (flops, 1.0)])
            for s, flops in enumerate(spent)
        },
    }


@pytest.mark.parametrize(
    ("spent", "figure", "cell_", "holds"),
    [
        (
            (50, 60, 91, 91, 91, 120, None),
            "median 0.91; within 0.75 on 2 of 7 seeds, ever on 6 of 7; p = 0.453",
            "0.91 (6/7)",
            None,
        ),
        ((50, 60, 150), "median 0.60; within 0.75 on 2 of 3 seeds, ever on 3 of 3; p = 1.000", "0.60 (3/3)", None),
        (
            (50, 60, None, None),
            "not reached on half of the seeds or more; within 0.75 on 2 of 4 seeds, ever on 2 of 4; p = 1.000",
            "– (2/4)",
            None,
        ),
        (
            (50, 60, 55, 70, 20, 30),
            "median 0.53; within 0.75 on 6 of 6 seeds, ever on 6 of 6; p = 0.031",
            "0.53 (6/6)",
            True,
        ),
        (
            (90, 80, 85, None, 99, 120),
            "median 0.95; within 0.75 on 0 of 6 seeds, ever on 5 of 6; p = 0.031",
            "0.95 (5/6)",
            False,
        ),
    ],
)
def test_reaching_at_any_cost_is_told_apart_from_reaching_in_time(spent, figure, cell_, holds):
    runs = reaching(*spent)
    runs["heuristic"][99] = record([(10, 3.0), (20, 0.1)])  # a seed that final lacks says nothing
    found = asked(runs)
    claim = "heuristic reaches final's loss with at most 0.75 of its FLOPs"
    assert (figures(found)[claim], verdicts(found)[claim]) == (figure, holds)
    assert cell(found, "heuristic", "to final's loss /\nfinal's (reached on)") == cell_


def test_a_missing_seed_does_not_move_the_budget_of_equal_flops():
    runs = {
        "none": {1: record([(5, 3.0), (60, 2.0)])},
        "a": {1: record([(10, 3.0), (40, 1.0)]), 2: record([(10, 3.0), (20, 2.0)])},
        "b": {1: record([(10, 3.0), (50, 1.0)])},
    }
    assert equal_flops(runs) == {1: 40}
    found = asked(runs)
    assert found.row("a").equal_loss.value == pytest.approx(1.0)  # seed 1 alone
    assert found.row("b").equal_loss.value == pytest.approx(1.5)
    assert found.notes == ("loss at equal FLOPs is over 1 of 2 seeds: those of every arm but none",)
    assert equal_flops({"a": {1: runs["a"][1]}, "b": {2: runs["b"][1]}}) == {}
    nothing = asked({"a": {1: runs["a"][1]}, "b": {2: runs["b"][1]}})
    assert nothing.row("a").equal_loss is None
    assert cell(nothing, "a", "loss at\nequal FLOPs") == "–"


def test_the_head_says_at_how_many_flops_losses_are_equal():
    runs = {"a": {1: record([(1, 3.0), (2_000_000_000, 1.0)]), 2: record([(1, 3.0), (3_000_000_000, 1.0)])}}
    assert any("loss at\n2.5000 GFLOP (mean)" in part.heads for part in table_parts(asked(runs)))


def test_notes_of_the_caller_come_first_and_are_shown_as_they_are(tmp_path):
    pytest.importorskip("matplotlib")
    note = "3 of 100 runs are missing: <b> [red]final/7[/red]"
    runs = {"none": scored(0.5, 0.51), "final": scored(0.6, 0.62), "mid": scored(0.5, 0.5)}
    found = asked(runs, notes=[note])
    assert found.notes == (note, "mid is no smaller than final here (100 against 100 parameters): not asked")
    text = printed(found, 130)
    assert all(line in text for line in found.notes)
    write_page(found, runs, tmp_path / "x.html", command="x", where={})
    page = (tmp_path / "x.html").read_text()
    assert "<li>3 of 100 runs are missing: &lt;b&gt; [red]final/7[/red]</li>" in page
    assert page.index("What may be said") < page.index("<li>3 of 100")


def test_a_page_that_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    runs = {"none": scored(0.5, 0.51)}
    found = asked(runs)
    (tmp_path / "compare.html").mkdir()  # nothing can be renamed onto a folder
    with pytest.raises(RunDirError, match=r"compare\.html: cannot be written .*--report"):
        write_page(found, runs, tmp_path / "compare.html", command="x", where={})
    assert [entry.name for entry in tmp_path.iterdir()] == ["compare.html"]
    with pytest.raises(RunDirError, match="cannot be written"):
        write_page(found, runs, tmp_path / "absent" / "compare.html", command="x", where={})
    names, replace = [], type(tmp_path).replace
    monkeypatch.setattr(type(tmp_path), "replace", lambda path, to: (names.append(path.name), replace(path, to))[1])
    write_page(found, runs, tmp_path / "other.html", command="x", where={})
    assert [name.split(".")[:3] for name in names] == [["", "other", "html"]]  # written beside it, then renamed


def test_the_page_holds_every_number_and_needs_nothing_else(tmp_path):
    pytest.importorskip("matplotlib")
    runs = arms(none=0.0, heuristic=0.01, final=0.01)
    stages = [(1, "r0c0", "GERMINATED"), (3, "r0c0", "TRAINING"), (6, "r0c0", "PRUNED")]
    runs["heuristic"][100] = record([(10, 2.0), (30, 0.9)], accuracy=0.6, stages=stages)
    found = compare("demo & more", runs, Metric.ACCURACY, sizes=[], subject="heuristic", flops_share=0.75, margin=0.01)
    path = tmp_path / "compare.html"
    write_page(found, runs, path, command="esper compare demo", where={"none/100": "RUN"})
    text = path.read_text()
    for part in table_parts(found):
        for value in (*part.heads, *(value for row in part.rows for value in row)):
            assert value.replace("&", "&amp;").replace(">", "&gt;").replace("'", "&#x27;") in text
    assert text.count("<svg") == 3
    assert "demo &amp; more" in text
    for outside in ("<script", "<link", "http-equiv", 'src="http', "@import"):
        assert outside not in text
    assert comparison_table(found) is not None


def test_markdown_holds_the_same_cells():
    found = asked(arms(none=0.0, heuristic=0.1, final=0.1, mid=0.0), notes=["one | two"])
    lines = markdown(found).splitlines()
    for part in table_parts(found):
        head = next(i for i, line in enumerate(lines) if line == f"{part.title}:") + 2
        table = [
            [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[head : head + 2 + len(part.rows)]
        ]
        assert [" ".join(text.split()) for text in part.heads] == table[0]
        assert lines[head + 1].count("---") == len(part.heads)
        assert [list(row) for row in part.rows] == table[2:]
    assert "| yes | heuristic beats none |" in markdown(found)
    assert lines[-1] == "Note: one | two."
