"""Arms derived: order, circles, equal FLOPs, planted topologies; every shipped comparison composes."""

import json
from pathlib import Path

import pytest

from esper.arms import Arm, CompareConfig, derive, flops_per_sample, load_compare
from esper.karn.comparison import Metric
from esper.launcher import conf_folder
from esper.leyline.errors import ConfigError

SHIPPED = sorted(path.stem for path in (conf_folder() / "compare").glob("*.yaml"))


def result(folder: Path, flops: int, topology: dict[str, str], operator: str = "ADD") -> Path:
    """A run directory with what arms are derived from."""
    folder.mkdir()
    grown = {slot: {"blueprint": name, "operator": operator} for slot, name in topology.items()}
    (folder / "result.json").write_text(json.dumps({"flops": flops, "topology": grown}))
    return folder


@pytest.mark.parametrize("name", SHIPPED)
def test_every_arm_of_a_shipped_comparison_composes(name, tmp_path):
    compare = load_compare(name, [])
    run = result(tmp_path / "run", 10**10, {})
    for arm in compare.in_order():
        if compare.arms[arm].flops is None:
            config, plain = derive(compare, arm, 100, dict.fromkeys(compare.arms, run))
            assert config.seed == plain["seed"] == 100
            assert config.run.dir


def test_an_arm_of_equal_flops_trains_as_many_steps_as_they_buy(tmp_path):
    compare = load_compare("digits_cpu", [])
    run = result(tmp_path / "run", 5 * 10**9, {})
    for arm, of in (("none_long", "heuristic"), ("mid_small", "final"), ("mid_large", "final"), ("wide", "final")):
        config, _ = derive(compare, arm, 100, {of: run})
        spent = config.trainer.steps * config.trainer.batch * flops_per_sample(config)
        assert spent == pytest.approx(5 * 10**9, rel=2e-3)


def test_an_arm_of_a_grown_topology_is_planted_with_it(tmp_path):
    compare = load_compare("digits_cpu", [])
    run = result(tmp_path / "run", 1, {"r0c0": "conv_light", "r1c0": "norm"})
    config, _ = derive(compare, "final", 100, {"heuristic": run})
    assert config.slots.planted == {"r0c0": "conv_light", "r1c0": "norm"}
    bare, _ = derive(compare, "none", 100, {})
    assert flops_per_sample(config) > flops_per_sample(bare)
    odd = result(tmp_path / "odd", 1, {"r0c0": "conv_light"}, "MULTIPLY")
    with pytest.raises(ConfigError, match="joined by ADD, not MULTIPLY"):
        derive(compare, "final", 100, {"heuristic": odd})


def test_those_that_others_wait_for_come_first_and_a_circle_is_refused():
    common = {"base": [], "seeds": [1], "metric": Metric.ACCURACY, "subject": "a", "flops_share": 1.0}
    arms = {"a": Arm(flops="b"), "b": Arm(topology="c"), "c": Arm()}
    compare = CompareConfig(arms=arms, **common)
    assert compare.in_order() == ["c", "b", "a"]
    with pytest.raises(ConfigError, match="waits for itself"):
        CompareConfig(arms={"a": Arm(flops="b"), "b": Arm(topology="a")}, **common)


def test_every_problem_of_a_comparison_is_told_with_its_place():
    with pytest.raises(ConfigError) as caught:
        load_compare("digits_cpu", ["seeds=[]", "flops_share=0", "subject=nobody", "armz=1"])
    assert "compare.armz" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        load_compare("digits_cpu", ["seeds=[1,1]", "flops_share=0", "subject=nobody"])
    assert all(word in str(caught.value) for word in ("compare.seeds", "compare.flops_share", "compare.subject"))
