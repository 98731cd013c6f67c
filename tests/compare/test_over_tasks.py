"""Comparisons over tasks: cells are run once, regret is measured by an oracle on other seeds, and the table says so."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esper.cli import main
from esper.compare.cells import CellStore
from esper.compare.growth import GrowthArm, GrowthCompareConfig, read_growth_compare
from esper.compare.kinds import KINDS, TaskKind, kind_of
from esper.compare.regret import EACH_SIZE, HALVING, claims, halve, loss_at, markdown, report_regrets, score_of
from esper.leyline.errors import ConfigError, EsperError
from esper.run.trials.cells import Point
from esper.simic.env.reward import RewardConfig

REWARD = RewardConfig(size_price=0.1, birth_price=0.01, prune_price=0.02, most_loss=2.5)
PLAIN: dict[str, Any] = {
    "tasks": ["hd1", "hr1"],
    "seeds": [0],
    "oracle_seeds": [2],
    "subject": "heuristic",
    "reference": "random",
    "margin": 0.1,
    "places": 8,
    "arms": {
        "none": {},
        "random": {"controller": {"kind": "random"}},
        "heuristic": {"controller": {"kind": "heuristic", "life_ticks": 2}},
        "size": {"seeds": {"digits": {"r1c0": "norm"}, "recall": {"r0c0": "norm"}}},
        "now": {"seeds": {"digits": {"r1c0": "norm"}}, "after": 0.0, "scored": False},
    },
}


def config_of(**changes: Any) -> GrowthCompareConfig:
    return read_growth_compare(Path("x.yaml"), json.loads(json.dumps({**PLAIN, **changes})))


def line(*losses: float, size: float = 1.0, births: int = 0) -> list[Point]:
    """A curve of so many ticks, of which the last has spent everything."""
    return [Point(10 * t, t / len(losses), loss, size, births, 0) for t, loss in enumerate(losses, start=1)]


def test_a_score_is_the_objective_against_the_host_without_growth() -> None:
    grown = score_of(line(2.0, 0.7, size=math.e, births=3), line(2.0, 1.0), REWARD)
    assert grown == pytest.approx(0.3 - 0.1 - 0.03)
    assert score_of(line(1.0), line(1.0), REWARD) == 0
    assert score_of(line(math.inf), line(1.0), REWARD) == -2.5


def test_halving_spends_one_budget_on_all_sizes_together() -> None:
    curves = [line(*np.linspace(4.0, end, 8)) for end in (3.0, 1.0, 2.0, 2.5)]
    assert loss_at(curves[1], 3 / 8) == pytest.approx(np.linspace(4.0, 1.0, 8)[2])
    assert halve(curves, 0.0, REWARD) == -2.5  # the best has 1/8 + 1/4 of a budget in the end, and is beyond most_loss
    assert halve(curves, 1.0, REWARD) == pytest.approx(1.0 - loss_at(curves[1], 3 / 8))
    assert halve(curves[:1], 2.5, REWARD) == pytest.approx(-0.5)


def test_cells_are_run_once_and_a_cut_line_again(tmp_path: Path) -> None:
    config = config_of()
    said: list[str] = []
    store = CellStore(config, tmp_path)
    store.run(said.append, lambda: len(said) == 4)
    assert len(said) == 4
    with pytest.raises(EsperError, match="not run yet"):
        report_regrets(store)
    path = tmp_path / "cells.jsonl"
    path.write_text(path.read_text()[:-20])  # a kill in the middle of a line
    store = CellStore(config, tmp_path)
    assert len(store.done) == 3
    store.run(said.append, lambda: False)
    wanted = {(one.says, one.seed) for one in store.wanted()}
    assert set(store.done) == wanted
    assert len(wanted) == 2 * (4 + 4) - 1  # in recall `now` never grows, as `none`
    assert len(said) == 4 + len(wanted) - 3
    report = report_regrets(store)
    assert report.seeds == (0,)
    assert set(report.arms) == {*config.scored, HALVING, EACH_SIZE}
    for number, (task, scale) in enumerate(report.scales.items()):
        bare = store.curve("none", task, 2)
        curves = {arm: store.curve(arm, task, 2) for arm in ("none", "random", "size", "now")}
        scores = {arm: score_of(curve or [], bare or [], config.reward) for arm, curve in curves.items()}
        best = max(scores["none"], scores["size"], scores["now"])
        assert scale.oracle == best >= 0
        assert scale.scale == max(best - scores["random"], best - min(scores["none"], scores["size"]), 0.005)
        assert report.arms["none"].regrets[:, number] == pytest.approx([best / scale.scale])
    text = markdown(config, report)
    assert f"| hd1 | {report.kinds['hd1'].kind} |" in text
    assert {found.kind for found in report.kinds.values()} <= set(KINDS)
    assert next(verdict for _, verdict in claims(config, report)) in ("yes", "NO", "open")
    late = replace(report, kinds=dict.fromkeys(report.kinds, TaskKind(kind="late")))
    assert claims(config, late)[-1] == ("less regret than random where growing pays late", "open")
    assert "| late | 2 |" in markdown(config, late)
    later = GrowthArm(seeds={"digits": {"r1c0": "norm"}}, after=0.5, scored=False)
    changed = CellStore(replace(config, arms={**config.arms, "now": later}), tmp_path)
    assert {one.arm for one in changed.wanted() if (one.says, one.seed) not in changed.done} == {"now"}


# losses of the grown arm at ticks 1 to 10 of two seeds, against a host that stays at 1.0
@pytest.mark.parametrize(
    ("grown", "kind"),
    [
        (([0.9] * 10, [0.88] * 10), "at once"),
        (([1.1] * 6 + [0.8] * 4, [1.2] * 6 + [0.82] * 4), "late"),
        (([1.2] * 10, [1.1] * 10), "never"),
        (([0.9] * 10, [1.0] * 10), "never"),  # 0.05 on average, and an error as large
        (([0.998] * 10, [0.998] * 10), "never"),  # too little to count
        (([0.9] * 10,), "?"),
    ],
)
def test_a_task_is_told_by_when_growing_pays(tmp_path: Path, grown: tuple[list[float], ...], kind: str) -> None:
    config = config_of(tasks=["hd1"], seeds=[0], reward={"size_price": 0.0})
    store = CellStore(config, tmp_path)
    says = {one.arm: one.says for one in store.wanted()}
    for seed, losses in zip((2, 0), grown, strict=False):
        store.done[says["none"], seed] = line(*[1.0] * 10)
        store.done[says["now"], seed] = line(*losses, size=2.0)
    found = kind_of(store, "hd1")
    assert found.kind == kind
    assert found.arm == "now"
    dear = CellStore(config_of(tasks=["hd1"], seeds=[0], reward={"size_price": 1.0}), tmp_path)
    dear.done = store.done
    assert kind_of(dear, "hd1").kind == ("?" if kind == "?" else "never")  # what it saves is not worth its size


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": ["hd99"]}, "task 'hd99': unknown"),
        ({"seeds": [2]}, "each once in all"),
        ({"subject": "nobody"}, "there must be an arm nobody"),
        ({"none": {"after": 0.5}}, "none is the host without growth"),
        ({"odd": {"seeds": {"music": {}}}}, "families of tasks are"),
        ({"odd": {"controller": {"kind": "none"}, "seeds": {"digits": {"r0c0": "norm"}}}}, "decides itself"),
    ],
)
def test_what_is_wrong_is_said(changes: dict[str, Any], says: str) -> None:
    arms = changes if set(changes) <= {"none", "odd"} else {}
    with pytest.raises(ConfigError, match=says):
        config_of(**(changes if not arms else {"arms": {**PLAIN["arms"], **arms}}))


def test_a_policy_that_is_not_there_is_said_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {**PLAIN["arms"], "policy": {"controller": {"kind": "policy", "checkpoint": str(tmp_path / "none.pt")}}}
    (tmp_path / "x.yaml").write_text(json.dumps({**PLAIN, "arms": arms}))
    assert main(["compare", str(tmp_path / "x.yaml"), "--out", str(tmp_path / "out")]) == ConfigError.exit_code
    assert "no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
