"""Arms derived: order, circles, equal FLOPs, planted topologies; every shipped comparison composes."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from esper.compare.arms import (
    Arm,
    CompareConfig,
    derive,
    load_compare,
    read_compare,
    read_result,
)
from esper.compare.growth import build_arm, read_growth_compare
from esper.compare.lengths import DataCache, flops_per_sample, steps_for
from esper.launcher.compose import conf_folder
from esper.leyline.errors import ConfigError, RunDirError
from esper.simic.env.tasks import find_task
from esper.tolaria.data import BatchPlan

SHIPPED = sorted(path.stem for path in (conf_folder() / "compare").glob("*.yaml"))
OVER_TASKS = [name for name in SHIPPED if "tasks" in read_compare(name, [])[1]]


def result(folder: Path, flops: int, topology: dict[str, str], operator: str = "ADD") -> Path:
    """A run directory with what arms are derived from."""
    folder.mkdir()
    grown = {slot: {"blueprint": name, "operator": operator} for slot, name in topology.items()}
    (folder / "result.json").write_text(json.dumps({"flops": flops, "topology": grown, "data": {"digest": 1}}))
    return folder


@pytest.fixture(scope="module")
def data() -> DataCache:
    return DataCache()


@pytest.mark.parametrize("name", OVER_TASKS)
def test_a_shipped_comparison_over_tasks_is_read(name):
    config = read_growth_compare(*read_compare(name, []))
    for arm in config.arms.values():
        if arm.controller is None or arm.controller["kind"] != "policy":
            for task in config.tasks:
                assert build_arm(arm, find_task(task))[1]


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in OVER_TASKS])
def test_every_arm_of_a_shipped_comparison_composes(name, data, tmp_path):
    compare = load_compare(name, [])
    run = result(tmp_path / "run", 10**10, {})
    for arm in compare.in_order():
        if compare.arms[arm].flops is None:
            config, plain = derive(compare, arm, 100, dict.fromkeys(compare.arms, run), data)
            assert config.seed == plain["seed"] == 100
            assert config.run.dir


def test_an_arm_of_equal_flops_trains_as_many_steps_as_they_buy(data, tmp_path):
    compare = load_compare("digits_cpu", [])
    run = result(tmp_path / "run", 5 * 10**9, {})
    for arm, of in (("none_long", "heuristic"), ("mid_small", "final"), ("mid_large", "final"), ("wide", "final")):
        config, _ = derive(compare, arm, 100, {of: run}, data)
        bundle = data(config.data)
        plan = BatchPlan(len(bundle.train), config.trainer.batch, 100)
        samples = sum(len(plan.indices(step)) for step in range(config.trainer.steps))
        step = config.trainer.batch * flops_per_sample(config, bundle)
        assert samples * flops_per_sample(config, bundle) == pytest.approx(5 * 10**9, abs=step / 2)


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (873, 64), (10, 9), (7, 20), (8, 4)])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_for_samples_count_the_short_batch_that_ends_an_epoch(size, batch, drop_last):
    plan = BatchPlan(size, batch, 0, drop_last=drop_last and batch <= size)
    count = 3 * plan.steps_per_epoch
    trained = [sum(len(plan.indices(step)) for step in range(steps)) for steps in range(count + 1)]
    assert [steps_for(samples, plan) for samples in trained[1:]] == list(range(1, count + 1))
    assert steps_for(0.1, plan) == 1
    for samples in np.linspace(1, 2.5 * size, 97):
        off = abs(trained[steps_for(samples, plan)] - samples)
        assert off == min(abs(there - samples) for there in trained[1:])


def test_an_arm_of_a_grown_topology_is_planted_with_it(data, tmp_path):
    compare = load_compare("digits_cpu", [])
    run = result(tmp_path / "run", 1, {"r0c0": "conv_light", "r1c0": "norm"})
    config, _ = derive(compare, "final", 100, {"heuristic": run}, data)
    assert config.slots.planted == {"r0c0": "conv_light", "r1c0": "norm"}
    bare, _ = derive(compare, "none", 100, {}, data)
    assert flops_per_sample(config, data(config.data)) > flops_per_sample(bare, data(bare.data))
    odd = result(tmp_path / "odd", 1, {"r0c0": "conv_light"}, "MULTIPLY")
    with pytest.raises(ConfigError, match="joined by ADD, not MULTIPLY"):
        derive(compare, "final", 100, {"heuristic": odd}, data)


def test_those_that_others_wait_for_come_first_and_a_circle_is_refused():
    common = {"base": [], "seeds": [1], "metric": "accuracy", "subject": "a", "flops_share": 1.0, "margin": 0.01}
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
        load_compare("digits_cpu", ["seeds=[1,1]", "flops_share=0", "margin=0", "subject=nobody"])
    said = str(caught.value)
    assert all(f"compare.{word}" in said for word in ("seeds", "flops_share", "margin", "subject"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arms: [", "own.yaml"),
        ("arms: 5", "compare.arms = 5: must be a mapping"),
        ("arms: {none: 5}", "compare.arms.none = 5: must be a mapping"),
        ("[]", "own.yaml: Cannot merge"),
    ],
)
def test_a_file_that_is_no_comparison_is_named(text, said, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(said)):
        load_compare(str(path), [])


@pytest.mark.parametrize("text", ["{", "[]", '{"flops": 5}'])
def test_a_damaged_result_says_what_to_do(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(RunDirError, match=r"result\.json.*; remove .*, and the same command runs it again"):
        read_result(tmp_path)
